"""The heat equation ∂u/∂t = Δu / 4 on the unit cube for times in [0, 1], with the conditions of a known solution.

Equations, networks, numbers of points and how often they are drawn: Dangel, Müller and Zeinhofer (2024), with the
settings of their published runs. As there, the initial condition and the boundary are one term, with half of its
points each.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor, nn

from studies.pinn.problems import sampling
from studies.pinn.problems.base import Field, Points, Problem, Residual, mlp
from studies.pinn.problems.poisson import SOURCE
from tengrad_triton import derivatives

DIFFUSIVITY = 1 / 4


def decaying_sine_product(x_ND: Tensor) -> Tensor:
    """Return exp(−π² d t / 4) Π sin(π x_d), for d coordinates of space."""
    time_N1, space = x_ND[:, :1], x_ND[:, 1:]
    rate = DIFFUSIVITY * space.shape[1] * math.pi**2
    return torch.exp(-rate * time_N1) * torch.sin(math.pi * space).prod(1, keepdim=True)


def decaying_sine_sum(x_ND: Tensor) -> Tensor:
    """Return exp(−t) Σ sin(2 x_d)."""
    return torch.exp(-x_ND[:, :1]) * torch.sin(2 * x_ND[:, 1:]).sum(1, keepdim=True)


def terms(solution: Field, u: nn.Module) -> dict[str, Residual]:
    """Return the residuals ∂u/∂t − Δu / 4 inside, and u − g at the start and on the boundary."""

    def interior(x_ND: Tensor) -> Tensor:
        d = derivatives(u, x_ND)
        return d.first[:, 0] - DIFFUSIVITY * d.second[:, 1:].sum(1)

    return {"interior": interior, "boundary": lambda x_ND: u(x_ND) - solution(x_ND)}


def points(dimension: int, inside: int, boundary: int, generator: torch.Generator) -> Points:
    """Draw points in space and time, and points of the boundary and of the start, half each."""
    edge_ND = sampling.sides_over_time(boundary // 2, dimension, generator)
    start_ND = sampling.at_the_start(boundary // 2, dimension, generator)
    return {
        "interior": sampling.cube(inside, 1 + dimension, generator),
        "boundary": torch.cat([edge_ND, start_ND]),
    }


@cache
def evaluation(count: int, dimension: int) -> Tensor:
    """Return the points [N, 1 + D] of the error, uniform in space and time."""
    return sampling.cube(count, 1 + dimension, sampling.generator(sampling.EVALUATION_SEED))


def _problem(dimension: int, solution: Field, counts: tuple[int, int], fresh_every: int, solved_by: str) -> Problem:
    inside, boundary = counts
    return Problem(
        name=f"heat{dimension}d",
        title=f"the heat equation in {dimension} + 1 dimensions, u = {solved_by}",
        source=SOURCE,
        build=partial(mlp, 1 + dimension, 64, 1),
        terms=partial(terms, solution),
        points=partial(points, dimension, inside, boundary),
        fresh_every=fresh_every,
        solution=solution,
        evaluation=partial(evaluation, 10 * inside, dimension),
    )


PROBLEMS = (
    _problem(1, decaying_sine_product, (900, 120), 0, "exp(−π²t/4) sin(πx)"),
    _problem(4, decaying_sine_sum, (3000, 500), 1, "exp(−t) Σ sin(2x)"),
)
