"""Interleaved timing: machines are noisy, and noise must affect all that is compared alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping

Timer = Callable[[], Mapping[str, float]]


def interleaved(timers: Mapping[str, Timer], rounds: int) -> dict[str, dict[str, float]]:
    """Run every timer once in each round, and return the spread of each of their times.

    A timer returns one or several times in seconds, by name. The timers of a round follow each other, so that load on
    the machine slows all of them.
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
    """Return the median, the quartiles and the extremes of times in seconds, and their number."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return {"median": median, "q1": low, "q3": high, "min": min(times), "max": max(times), "rounds": len(times)}


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds as text, without meaningless digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def microseconds(seconds: float) -> str:
    """Return a time in microseconds as text, without meaningless digits."""
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:.0f}"


def mean_step(refresh: float, reuse: float, every: int = 100) -> float:
    """Return the mean time of a step at ``refresh_every=every``, from the medians of refresh and reuse steps."""
    return (refresh + (every - 1) * reuse) / every
