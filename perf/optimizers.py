"""The time of the optimizer alone: TENGraD against the authors' formulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from perf.loops import PARTS, paper, tengrad, timed_step
from perf.models import MODELS
from perf.timing import interleaved, mean_step


@dataclass(frozen=True)
class OptimizerCase:
    """A model, and a batch size at which N² P² numbers fit into memory."""

    model: str
    samples: int
    rounds: int

    def __str__(self) -> str:
        return f"optimizer of {self.model}, N = {self.samples}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of the parts of a step in both formulations, and how many times faster TENGraD is."""
        made = MODELS[self.model]
        x, y = made.batch(self.samples, device)
        timers = {name: parts_timer(name, make, made.on(device), x, y) for name, make in FORMULATIONS.items()}
        for timer in timers.values():
            timer()
        times = interleaved(timers, self.rounds)
        seconds = {name: optimizer_seconds(times, name) for name in FORMULATIONS}
        speedups = {kind: seconds["paper"][kind] / seconds["tengrad"][kind] for kind in ("refresh", "reuse", "mean")}
        return {**asdict(self), "seconds": times, "optimizer_seconds": seconds, "speedup": speedups}


REUSES = 5
FORMULATIONS: Mapping[str, Callable[..., Any]] = {"tengrad": tengrad, "paper": paper}


def parts_timer(
    name: str, make: Callable[..., Any], model: nn.Module, x: Tensor, y: Tensor
) -> Callable[[], dict[str, float]]:
    """Return a timer of the parts of a refreshing step, of the step after it, and of later steps, as their mean."""
    optimizer = make(model, 2 + REUSES)

    def parts(steps: int) -> dict[str, float]:
        times = [timed_step(model, optimizer, x, y) for _ in range(steps)]
        return {part: fmean(step[part] for step in times) for part in PARTS}

    def timer() -> dict[str, float]:
        steps = {kind: parts(count) for kind, count in (("refresh", 1), ("first", 1), ("reuse", REUSES))}
        return {f"{name} {kind} {part}": t for kind, times in steps.items() for part, t in times.items()}

    return timer


def optimizer_seconds(times: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """Return the seconds that the optimizer adds to forward and backward, from the spreads of `parts_timer`.

    The capture is the difference of the forwards with and without a refresh; everything else is in ``step()``. The
    first step after a refresh is slower, because the refresh has filled the caches; the mean step counts it once in a
    hundred.
    """
    forwards = [times[f"{name} {kind} forward"]["median"] for kind in ("refresh", "reuse")]
    capture = max(0.0, forwards[0] - forwards[1])
    refresh, first, reuse = (times[f"{name} {kind} update"]["median"] for kind in ("refresh", "first", "reuse"))
    return {
        "capture": capture,
        "refresh": capture + refresh,
        "reuse": reuse,
        "mean": mean_step(capture + refresh + first - reuse, reuse),
    }
