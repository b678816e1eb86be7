"""Interleaved timing: machines are noisy, and what is compared must meet the same noise."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Timer = Callable[[], Mapping[str, float]]


def now(device: torch.device) -> float:
    """Return the time in seconds, after all that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(timers: Mapping[str, Timer], rounds: int) -> dict[str, dict[str, float]]:
    """Run every timer once a round, and return the spread of each of the times that they return.

    A timer returns one or several times in seconds, by name. Within a round they follow each other, so that what slows
    the machine down slows all of them.
    """
    samples: dict[str, list[float]] = {}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for timer in timers.values():
                for name, seconds in timer().items():
                    samples.setdefault(name, []).append(seconds)
    finally:
        gc.enable()
    return {name: spread(times) for name, times in samples.items()}


def spread(times: list[float]) -> dict[str, float]:
    """Return median, quartiles and extremes of some times in seconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return {"median": median, "q1": low, "q3": high, "min": min(times), "max": max(times), "rounds": len(times)}


def mean_step(refresh: float, reuse: float, every: int = 100) -> float:
    """Return the mean time of a step at ``refresh_every=every``, from the medians of both kinds."""
    return (refresh + (every - 1) * reuse) / every
