"""Burgers' equation ∂u/∂t + u ∂u/∂x = ν ∂²u/∂x² on [−1, 1] for times in [0, 1], ν = 0.01 / π.

u(0, x) = −sin(πx) and u(t, ±1) = 0, as in Basdevant et al. (1986) and Raissi et al. (2019). At t = 1.6037 / π the slope
at x = 0 is steepest. The solution is the formula of Cole and Hopf, whose integrals are sums over equidistant nodes:
for a smooth integrand that falls like exp(−z²) their error falls faster than any power of the distance.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor, nn

from studies.pinn.problems import sampling
from studies.pinn.problems.base import Points, Problem, Residual, mlp
from tengrad_triton import derivatives

VISCOSITY = 0.01 / math.pi
REACH, NODES = 12.0, 301  # z from −REACH to REACH, 0.08 apart; the weight is largest within ±9
INSIDE, AT_START, AT_ENDS = 2000, 100, 100
CHUNK = 4096  # points whose integrals are in memory at once


def solution(x_N2: Tensor) -> Tensor:
    """Return u [N, 1] at points (t, x).

    u = −⟨sin(π(x − s z))⟩ with s = √(4νt), and ⟨·⟩ the mean over z with the weight
    exp(−z² − cos(π(x − s z)) / (2πν)).
    """
    return torch.cat([_solution(part) for part in x_N2.split(CHUNK)])


def _solution(x_N2: Tensor) -> Tensor:
    z_Z = sampling.linspace(-REACH, REACH, NODES)
    angle_NZ = math.pi * (x_N2[:, 1:] - (4 * VISCOSITY * x_N2[:, :1]).sqrt() * z_Z)
    weight_NZ = torch.softmax(-(z_Z**2) - torch.cos(angle_NZ) / (2 * math.pi * VISCOSITY), 1)
    return -(weight_NZ * torch.sin(angle_NZ)).sum(1, keepdim=True)


def terms(u: nn.Module) -> dict[str, Residual]:
    """Return the residuals of the equation, of the start and of the ends."""

    def interior(x_N2: Tensor) -> Tensor:
        d = derivatives(u, x_N2)
        return d.first[:, 0] + d.value * d.first[:, 1] - VISCOSITY * d.second[:, 1]

    return {
        "interior": interior,
        "initial": lambda x_N2: u(x_N2) + torch.sin(math.pi * x_N2[:, 1:]),
        "boundary": u,
    }


def points(generator: torch.Generator) -> Points:
    """Draw points (t, x) of the inside, of the start and of both ends."""
    unit = {
        "interior": sampling.cube(INSIDE, 2, generator),
        "initial": sampling.at_the_start(AT_START, 1, generator),
        "boundary": sampling.sides_over_time(AT_ENDS, 1, generator),
    }
    scale_2, shift_2 = (torch.tensor(pair, dtype=torch.float64) for pair in ((1, 2), (0, 1)))
    return {name: scale_2 * x_N2 - shift_2 for name, x_N2 in unit.items()}


@cache
def evaluation() -> Tensor:
    """Return a grid of 100 times and 256 places."""
    return sampling.grid(sampling.linspace(0, 1, 100), sampling.linspace(-1, 1, 256))


@cache
def _on_grid() -> Tensor:
    return solution(evaluation())


def known(x_N2: Tensor) -> Tensor:
    """Return u, from memory on the grid of the error: its integrals take a second."""
    return _on_grid() if x_N2 is evaluation() else solution(x_N2)


PROBLEM = Problem(
    name="burgers",
    title="Burgers' equation, ν = 0.01 / π",
    source="equation: Basdevant et al. (1986); network and points are this study's",
    build=partial(mlp, 2, 20, 20, 20, 20, 1),
    terms=terms,
    points=points,
    fresh_every=1,
    solution=known,
    evaluation=evaluation,
)
