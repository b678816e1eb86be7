"""Where the time of a step goes: the ranges that the optimizers mark, from torch's profiler."""

import statistics
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.loop import Job, closing_hooks, one_step, warm_up

PHASES = ("capture", "curvature", "solve", "update")
REST = "forward and backward"
EVERY, ROUNDS = 4, 3  # one step of four refreshes the curvature


def measured(job: Job, name: OptimizerName) -> dict[str, dict[str, float]]:
    """Return seconds by phase of the steps that refresh the curvature and of those that reuse it, as medians.

    What is in none of the ranges is forward and backward, a refresh's further ones among it. An optimizer that marks
    none has its whole step as the update.
    """
    warm_up(job, name)
    own = job.settings.of(name)
    refreshes = hasattr(own, "refresh_every")
    if refreshes:
        own = replace(own, refresh_every=EVERY)  # type: ignore[type-var]
    model = job.model().to(job.device)
    optimizer = own.build(model)
    images, labels = next(job.data.batches("train", job.settings.batch_size))
    steps = []
    with closing_hooks(optimizer):
        for _ in range(EVERY * ROUNDS):
            with profile(activities=_activities(job)) as profiler:
                begun = now(job.device)
                one_step(model, optimizer, images, labels, own.closure)
                whole = now(job.device) - begun
            steps.append(_by_phase(profiler, whole))
    kinds = {"refresh": steps[::EVERY], "reuse": [step for n, step in enumerate(steps) if n % EVERY]}
    return {kind: _medians(of) for kind, of in kinds.items() if refreshes or kind == "reuse"}


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
        marked = {"update": max(steps)}  # the outermost, where an optimizer is made of others
    return {REST: max(0.0, whole - sum(marked.values())), **{phase: marked.get(phase, 0.0) for phase in PHASES}}


def _seconds(event: Any) -> float:
    """Return an event's time: the device's where it has some, the host's elsewhere; the profiler counts in µs."""
    return (getattr(event, "device_time_total", 0) or event.cpu_time_total) / 1e6
