"""Line searches along a Gauss-Newton direction, on the step's own points.

A trial is a step length η with the parameters θ − η δ − η² q, where q is the geodesic acceleration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

LineSearch = Literal["grid", "armijo"]
LINE_SEARCHES: tuple[LineSearch, ...] = ("grid", "armijo")
_GRID = 10  # step lengths lr, lr / 2, …, lr / 2¹⁰, and 2 lr
_ARMIJO = 1e-4  # the share of the linear decrease that a step has to reach (Nocedal and Wright 2006, section 3.1)

Trial = tuple[float, float]
"""A step length, and the loss there."""


def grid(lr: float, losses_at: Callable[[Sequence[float]], Tensor]) -> Trial:
    """Return the step length of 2 lr, lr, lr / 2, … with the lowest loss (Müller and Zeinhofer 2023, algorithm 1)."""
    lengths = [2 * lr / 2**k for k in range(_GRID + 2)]
    losses = torch.nan_to_num(losses_at(lengths), nan=torch.inf, posinf=torch.inf)
    best = int(losses.argmin())
    return lengths[best], float(losses[best])


def armijo(lr: float, loss: float, slope: float, loss_at: Callable[[float], float]) -> Trial:
    """Return the first step length of lr, lr / 2, … whose loss is at most loss − 10⁻⁴ η slope.

    Args:
        lr: the first step length.
        loss: before the step.
        slope: by how much the loss falls for each unit of step length, at its beginning.
        loss_at: returns the loss of a step length.
    """
    length, found = lr, loss_at(lr)
    for _ in range(_GRID):
        if found <= loss - _ARMIJO * length * slope:
            break
        length /= 2
        found = loss_at(length)
    return length, found
