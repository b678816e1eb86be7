"""Random points, uniform in the set, in float64, and grids to measure errors on.

Dangel, Müller and Zeinhofer draw in float32, and compute right-hand sides and boundary values in float32 too; here all
is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

EVALUATION_SEED = 2024


def generator(seed: int) -> torch.Generator:
    """Return a generator of a seed."""
    return torch.Generator().manual_seed(seed)


def cube(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return points [N, D] of the unit cube."""
    return torch.rand(count, dimension, dtype=torch.float64, generator=generator)


def sides(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return points [N, D] of the boundary of the unit cube."""
    x_ND = cube(count, dimension, generator)
    which_N1 = torch.randint(dimension, (count, 1), generator=generator)
    side_N1 = torch.randint(2, (count, 1), generator=generator).double()
    return x_ND.scatter(1, which_N1, side_N1)


def sides_over_time(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return points [N, 1 + D]: a time in [0, 1], and a point of the boundary of the unit cube."""
    return torch.cat([cube(count, 1, generator), sides(count, dimension, generator)], 1)


def at_the_start(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Return points [N, 1 + D]: the time 0, and a point of the unit cube."""
    return torch.cat([torch.zeros(count, 1, dtype=torch.float64), cube(count, dimension, generator)], 1)


def grid(times_T: Tensor, places_X: Tensor) -> Tensor:
    """Return all pairs [T X, 2] of a time and a place."""
    return torch.cartesian_prod(times_T, places_X)


def linspace(low: float, high: float, count: int) -> Tensor:
    """Return equidistant numbers in float64, ends included."""
    return torch.linspace(low, high, count, dtype=torch.float64)
