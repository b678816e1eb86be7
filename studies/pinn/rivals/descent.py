"""What all rivals share: the step along a direction.

Key: P parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from studies.pinn.rivals.squares import LeastSquares

GRID = tuple(2.0**k for k in range(-30, 1))
"The step sizes of the line search of Müller and Zeinhofer, 2023."


class Rival(ABC):
    """An optimizer of a least-squares problem; a step moves along a direction that it finds.

    Args:
        squares: the problem and its network.
        lr: a fixed step size, or None for the best one of ``GRID``.
    """

    def __init__(self, squares: LeastSquares, lr: float | None = None) -> None:
        self.squares = squares
        self.lr = lr
        self.steps = 0

    @abstractmethod
    def direction(self, points: Mapping[str, Any]) -> tuple[Tensor, float]:
        """Return where to go, ``[P]``, and the loss here."""

    def longest(self) -> float:
        """Return an upper bound of a fixed step size."""
        return math.inf

    def step(self, points: Mapping[str, Any]) -> None:
        """Move the parameters once."""
        direction_P, loss = self.direction(points)
        if self.lr is None:
            search_grid(self.squares, points, direction_P, loss)
        else:
            move(self.squares, direction_P, min(self.lr, self.longest()))
        self.steps += 1


@torch.no_grad()
def move(squares: LeastSquares, direction_P: Tensor, size: float) -> None:
    """Add ``size`` times a direction to the parameters."""
    vector_to_parameters(parameters_to_vector(squares.parameters) + size * direction_P, squares.parameters)


@torch.no_grad()
def search_grid(squares: LeastSquares, points: Mapping[str, Any], direction_P: Tensor, loss: float) -> float:
    """Take the step size of ``GRID`` with the lowest loss, or none if all are above ``loss``, and return it."""
    start_P = parameters_to_vector(squares.parameters)
    losses = []
    for size in GRID:
        vector_to_parameters(torch.add(start_P, direction_P, alpha=size), squares.parameters)
        value = squares.loss(points)
        losses.append(value if math.isfinite(value) else math.inf)
    best = min(losses)
    size = GRID[losses.index(best)] if best <= loss else 0.0
    vector_to_parameters(torch.add(start_P, direction_P, alpha=size), squares.parameters)
    return size
