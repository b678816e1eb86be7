"""The time of the runs, estimated from an optimizer's first steps."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.loop import EVAL_BATCH
from tengrad_triton.recipes.training.run import refusing
from tengrad_triton.recipes.training.warm_up import seconds_of_steps

SLOW = 1.0  # seconds of a step; slower ones are not measured as they are


@dataclass(frozen=True)
class Probe:
    """A small part of the work, which is measured for an estimate.

    Attributes:
        key: probes with equal keys are measured once.
        label: what the user reads while it is measured.
    """

    key: Hashable
    label: str
    take: Callable[[], Any]


Found = Mapping[Hashable, Any]
"""What the probes have found, by their keys."""


def take_all(probes: Iterable[Probe], shared: Shared) -> Found:
    """Take all probes, and say which."""
    by_key: dict[Hashable, Probe] = {}
    for probe in probes:
        by_key.setdefault(probe.key, probe)
    if by_key and shared.device.type == "cpu":
        shared.say(f"pieces to measure: {len(by_key)}; at the paper's scale on a CPU each can take minutes")
    with shared.telling("estimating", len(by_key)) as tell:
        found = {}
        for key, probe in by_key.items():
            tell(probe.label)
            found[key] = probe.take()
        return found


@dataclass(frozen=True)
class StepTimes:
    """How long an optimizer's steps take.

    Attributes:
        plain: seconds of a step that reuses the curvature.
        refresh: seconds that a refresh takes in addition.
        own: the settings of the optimizer, which know the steps that refresh.
    """

    plain: float
    refresh: float
    own: OptimizerSettings

    def seconds(self, steps: int) -> float:
        """Return the seconds of so many steps from the start."""
        return self.plain * steps + self.refresh * len(self.own.refreshes(steps))


def probe_of_steps(job: Job, name: OptimizerName) -> Probe:
    """Return the probe of an optimizer's steps.

    Runs of the same model on images of the same size share it: CIFAR-100 takes the time of CIFAR-10.
    """
    settings = job.settings
    kind = (settings.model, settings.channels, settings.batch_size, tuple(job.data.train.images.shape[1:]))
    return Probe(("steps", *kind, name), f"steps of {name} on {settings.model}", partial(step_times, job, name))


def step_times(job: Job, name: OptimizerName) -> StepTimes:
    """Measure an optimizer's first steps; raises `UsageError` if it rejects a setting or runs out of memory.

    On a CPU, slow steps are measured with a 16th and a 4th of the images, and follow a straight line through these:
    forward and backward are in proportion to the images, and what the weights' sizes determine is the same for all.
    """
    with refusing(name):
        first, plain = _first_and_plain(job, name)
    return StepTimes(plain, max(0.0, first - plain), job.settings.of(name))


def _first_and_plain(job: Job, name: OptimizerName) -> tuple[float, float]:
    """Return the seconds of a step that refreshes the curvature and of one that reuses it."""
    batch = job.settings.batch_size
    few, some = max(2, batch // 16), max(4, batch // 4)
    if job.device.type == "cpu" and some < batch:
        small = _measured(_with_batch(job, few), name, steps=3)
        if small[1] * batch / few > SLOW:
            larger = _measured(_with_batch(job, some), name, steps=3, warm=True)
            beyond = (batch - some) / (some - few)
            first, plain = (b + max(0.0, b - a) * beyond for a, b in zip(small, larger, strict=True))
            return first, plain
    return _measured(job, name, steps=5)


def _measured(job: Job, name: OptimizerName, steps: int, warm: bool = False) -> tuple[float, float]:
    """Do what `_first_and_plain` does with so many steps, after a warm-up: the first steps of all take longer."""
    if not warm:
        seconds_of_steps(job, name, 2)
    first, _, *later = seconds_of_steps(job, name, steps, one_interval=True)
    return first, statistics.median(later)


def _with_batch(job: Job, size: int) -> Job:
    return replace(job, settings=replace(job.settings, batch_size=size))


def seconds_of_run(job: Job, times: StepTimes) -> float:
    """Return the seconds of a whole run: its warm-up, its steps and its evaluations.

    The evaluation of an image counts as a third of its share of a plain step, and each batch as a millisecond more.
    """
    settings = job.settings
    steps = settings.epochs * -(-len(job.data.train) // settings.batch_size)
    images = settings.epochs * len(job.data.test)
    evaluations = images * (times.plain / settings.batch_size / 3 + 1e-3 / EVAL_BATCH)
    return times.seconds(2) + times.seconds(steps) + evaluations
