"""Convection ∂u/∂t + β ∂u/∂x = 0 on [0, 2π], periodic, for times in [0, 1], with u(0, x) = sin x and β = 30.

Network and points: Krishnapriyan et al., "Characterizing possible failure modes in physics-informed neural networks"
(2021), with the settings of their published code. Their coordinates are (x, t), here (t, x). They draw the points once;
the second problem differs from theirs by drawing them anew at every step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from studies.pinn.problems import sampling
from studies.pinn.problems.base import Points, Problem, Residual, mlp
from tengrad_triton import derivatives

SPEED = 30.0
INSIDE, TIMES, PLACES = 1000, 100, 256


def solution(x_N2: Tensor) -> Tensor:
    """Return sin(x − βt)."""
    return torch.sin(x_N2[:, 1:] - SPEED * x_N2[:, :1])


def terms(u: nn.Module) -> dict[str, Residual]:
    """Return the residuals of the equation, of the start, and u(t, 0) − u(t, 2π)."""

    def interior(x_N2: Tensor) -> Tensor:
        first_N21 = derivatives(u, x_N2, second=False).first
        return first_N21[:, 0] + SPEED * first_N21[:, 1]

    return {
        "interior": interior,
        "initial": lambda x_N2: u(x_N2) - torch.sin(x_N2[:, 1:]),
        "periodic": lambda left_N2, right_N2: u(left_N2) - u(right_N2),
    }


def times() -> Tensor:
    """Return the times of the grid."""
    return sampling.linspace(0, 1, TIMES)


def places() -> Tensor:
    """Return the places of the grid; the last one is left out, for it is the first one again."""
    return sampling.linspace(0, 2 * math.pi, PLACES + 1)[:-1]


def points(generator: torch.Generator) -> Points:
    """Draw points of the grid's inside; the start and the ends have all points of the grid."""
    inside_N2 = sampling.grid(times()[1:], places()[1:])
    chosen_N = torch.randperm(len(inside_N2), generator=generator)[:INSIDE]
    zero, turn = torch.zeros(1, dtype=torch.float64), torch.full((1,), 2 * math.pi, dtype=torch.float64)
    return {
        "interior": inside_N2[chosen_N],
        "initial": sampling.grid(zero, places()),
        "periodic": (sampling.grid(times(), zero), sampling.grid(times(), turn)),
    }


@cache
def evaluation() -> Tensor:
    """Return the whole grid."""
    return sampling.grid(times(), places())


PUBLISHED = Problem(
    name="convection",
    title="convection, β = 30",
    source="Krishnapriyan et al. (2021)",
    build=partial(mlp, 2, 50, 50, 50, 50, 1),
    terms=terms,
    points=points,
    fresh_every=0,
    solution=solution,
    evaluation=evaluation,
    note=lambda: (
        "There are fewer residuals than parameters: at points that are drawn once all residuals can vanish while u is "
        "wrong in between."
    ),
)
PROBLEMS = (
    PUBLISHED,
    replace(
        PUBLISHED,
        name="convection-fresh",
        title=f"{PUBLISHED.title}, new points at every step",
        fresh_every=1,
        note=str,
    ),
)
