"""The time of a step by phase: the ranges that the optimizers mark, from torch's profiler."""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.job import Job, closing_hooks
from tengrad_triton.recipes.training.loop import one_step
from tengrad_triton.recipes.training.warm_up import warm_up

PHASES = ("capture", "curvature", "solve", "update")
REST = "forward and backward"
EVERY, ROUNDS = 4, 3  # one step in four refreshes the curvature


def measure_phases(job: Job, name: OptimizerName) -> dict[str, dict[str, float]]:
    """Return the median seconds of each phase, for steps that refresh the curvature and for steps that reuse it.

    Time outside of all ranges counts as forward and backward, such as the further ones of a refresh. The whole step of
    an optimizer that marks no range counts as the update.
    """
    warm_up(job, name)
    steps = list(_profiled_steps(job, name, EVERY * ROUNDS))
    refreshes = job.settings.of(name).changed(refresh_every=EVERY).refreshes(len(steps))
    kinds = {"refresh": [steps[n] for n in refreshes], "reuse": [s for n, s in enumerate(steps) if n not in refreshes]}
    return {kind: _medians(of) for kind, of in kinds.items() if of}


def seconds_of_phases(job: Job, name: OptimizerName) -> float:
    """Return how long `measure_phases` takes, from its first steps: a warm-up, one refresh and one step without it."""
    start = now(job.device)
    warm_up(job, name)
    times = [now(job.device)]
    times += [now(job.device) for _ in _profiled_steps(job, name, 2)]
    refresh, reuse = (end - begun for begun, end in pairwise(times))
    return times[0] - start + ROUNDS * (refresh + (EVERY - 1) * reuse)


def _profiled_steps(job: Job, name: OptimizerName, count: int) -> Iterator[dict[str, float]]:
    """Yield the seconds of each phase in an optimizer's first steps."""
    own = job.settings.of(name).changed(refresh_every=EVERY)
    model = job.model().to(job.device)
    optimizer = own.build(model)
    images, labels = next(job.data.batches("train", job.settings.batch_size))
    with closing_hooks(optimizer):
        for _ in range(count):
            with _profiling(job) as profiler:
                begun = now(job.device)
                one_step(model, optimizer, images, labels, own.needs_closure)
                whole = now(job.device) - begun
            yield _by_phase(profiler, whole)


@contextmanager
def _profiling(job: Job) -> Iterator[profile]:
    profiler = profile(activities=_activities(job))
    with _stderr_discarded():
        profiler.start()
    try:
        yield profiler
    finally:
        with _stderr_discarded():
            profiler.stop()


@contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discard what is written to stderr: the profiler's library writes lines there that no setting stops."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}


def _activities(job: Job) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if job.device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def _by_phase(profiler: Any, whole: float) -> dict[str, float]:
    events = {event.key: event for event in profiler.key_averages()}
    marked = {phase: _seconds(events[phase]) for phase in PHASES if phase in events}
    if not marked:
        steps = (_seconds(event) for key, event in events.items() if key.startswith("Optimizer.step#"))
        marked = {"update": max(steps)}  # the outermost, if an optimizer consists of several
    return {REST: max(0.0, whole - sum(marked.values())), **{phase: marked.get(phase, 0.0) for phase in PHASES}}


def _seconds(event: Any) -> float:
    """Return the seconds of an event on the device, or on the host if it has none; the profiler counts in µs."""
    return (getattr(event, "device_time_total", 0) or event.cpu_time_total) / 1e6
