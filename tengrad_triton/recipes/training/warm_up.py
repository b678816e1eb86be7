"""An optimizer's first steps outside of a run: a warm-up, and how long steps take after it."""

from dataclasses import dataclass
from itertools import cycle, islice, pairwise

from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training import loop
from tengrad_triton.recipes.training.job import Job, closing_hooks

NEVER = 10**9  # an interval that no run reaches


@dataclass(frozen=True)
class WarmUp:
    """How many seconds an optimizer's first two steps took, and its summary of the parameters, if it has one."""

    seconds: float
    summary: str | None


def warm_up(job: Job, name: OptimizerName) -> WarmUp:
    """Take two steps with a model that is then discarded; raises `ValueError` if the optimizer rejects a setting.

    Kernels are compiled and libraries loaded here, outside of any optimizer's time. An optimizer that cannot train the
    model raises its error here, before a file is written. TENGraD's second step is its first that reuses the curvature.
    """
    start = now(job.device)
    model, optimizer = job.build(name)
    size = job.settings.batch_size
    with closing_hooks(optimizer):
        for _, (images, labels) in zip(range(2), job.data.batches("train", size), strict=False):
            loop.one_step(model, optimizer, images, labels, job.settings.of(name).needs_closure)
        seconds = now(job.device) - start
        return WarmUp(seconds, str(optimizer.summary()) if hasattr(optimizer, "summary") else None)


def seconds_of_steps(job: Job, name: OptimizerName, steps: int, one_interval: bool = False) -> list[float]:
    """Return the seconds of each of an optimizer's first steps. The first refreshes the curvature.

    With ``one_interval`` all from the third step on reuse the curvature, whatever the optimizer's interval is.
    """
    model, optimizer = job.build(name)
    batches = cycle(islice(job.data.batches("train", job.settings.batch_size), steps))
    times = [now(job.device)]
    with closing_hooks(optimizer):
        for images, labels in islice(batches, steps):
            loop.one_step(model, optimizer, images, labels, job.settings.of(name).needs_closure)
            times.append(now(job.device))
            if one_interval and hasattr(optimizer, "refresh_every"):
                optimizer.refresh_every = NEVER  # the second step may be under way to a refresh already
    return [end - start for start, end in pairwise(times)]
