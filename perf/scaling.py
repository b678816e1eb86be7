"""How the cost grows with the batch, the width and the depth of 3 × 3 convolutions, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from perf.loops import sgd, tengrad, timed_step
from perf.models import Model, convolutions
from perf.optimizers import optimizer_seconds, parts_timer
from perf.timing import interleaved
from tengrad_triton.recipes.measuring.power_law import exponent

Quantity = Literal["samples", "width", "depth"]
QUANTITIES: tuple[Quantity, ...] = ("samples", "width", "depth")


@dataclass(frozen=True)
class ScalingCase:
    """The quantity that varies and its values; the others have their values in ``base``."""

    quantity: Quantity
    values: Sequence[int]
    base: dict[Quantity, int]
    rounds: int

    def __str__(self) -> str:
        return f"cost by {self.quantity}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the optimizer's seconds and those of SGD's whole step at each value, and the fitted exponents."""
        timers: dict[str, Callable[[], dict[str, float]]] = {}
        for value in self.values:
            timers |= _timers(self.base | {self.quantity: value}, value, device)
        for timer in timers.values():
            timer()
        times = interleaved(timers, self.rounds)
        curves = {name: [_seconds(times, value)[name] for value in self.values] for name in CURVES}
        exponents = {name: exponent(self.values, curve) for name, curve in curves.items()}
        return {**asdict(self), "seconds": times, "curves": curves, "exponents": exponents}


CURVES = ("refresh", "reuse", "sgd")


def _timers(sizes: dict[Quantity, int], value: int, device: torch.device) -> dict[str, Callable[[], dict[str, float]]]:
    made = Model(lambda: convolutions(sizes["width"], sizes["depth"]), (1, 14, 14))
    x, y = made.batch(sizes["samples"], device)
    plain = made.on(device)
    optimizer = sgd(plain)
    return {
        f"tengrad {value}": parts_timer(f"tengrad {value}", tengrad, made.on(device), x, y),
        f"sgd {value}": lambda: {f"sgd {value}": sum(timed_step(plain, optimizer, x, y).values())},
    }


def _seconds(times: dict[str, dict[str, float]], value: int) -> dict[str, float]:
    return optimizer_seconds(times, f"tengrad {value}") | {"sgd": times[f"sgd {value}"]["median"]}
