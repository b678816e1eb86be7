"""An inverse problem: the diffusivity κ of ∂u/∂t = κ ∂²u/∂x², from noisy measurements of u.

u = exp(−κπ²t) sin(πx) + exp(−9κπ²t) sin(3πx) / 2 with κ = 0.1. No condition is given, neither at the start nor at the
ends. The measurements are at random points, with normal noise of standard deviation 0.01. No optimizer finds κ more
exactly than the noise allows.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import jacfwd
from typing_extensions import override

from studies.pinn.problems import sampling
from studies.pinn.problems.base import Points, Problem, Residual, mlp
from tengrad_triton import derivatives

DIFFUSIVITY, GUESS = 0.1, 1.0
INSIDE, MEASURED, NOISE = 1000, 200, 0.01


class WithDiffusivity(nn.Module):
    """A network for u, and the diffusivity, a parameter of its own, whose first guess is ten times too large."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.diffusivity = nn.Parameter(torch.tensor(GUESS, dtype=torch.float64))

    @override
    def forward(self, x_N2: Tensor) -> Tensor:
        """Return u [N, 1] at points (t, x)."""
        return self.network(x_N2)


def build() -> nn.Module:
    """Return the network with the guess."""
    return WithDiffusivity(mlp(2, 32, 32, 1))


def waves(x_N2: Tensor, diffusivity: Tensor) -> Tensor:
    """Return the two decaying waves, given κ."""
    time_N1, place_N1 = x_N2[:, :1], x_N2[:, 1:]
    first_N1, third_N1 = (
        torch.exp(-diffusivity * (k * math.pi) ** 2 * time_N1) * torch.sin(k * math.pi * place_N1) for k in (1, 3)
    )
    return first_N1 + third_N1 / 2


def solution(x_N2: Tensor) -> Tensor:
    """Return u."""
    return waves(x_N2, torch.tensor(DIFFUSIVITY, dtype=torch.float64))


def terms(model: nn.Module) -> dict[str, Residual]:
    """Return the residual of the equation, and u minus what was measured."""
    assert isinstance(model, WithDiffusivity)

    def interior(x_N2: Tensor) -> Tensor:
        d = derivatives(model.network, x_N2)
        return d.first[:, 0] - model.diffusivity * d.second[:, 1]

    return {"interior": interior, "measured": lambda x_N2, u_N1: model(x_N2) - u_N1}


def points(generator: torch.Generator) -> Points:
    """Draw points inside, the points of the measurements, and their noise."""
    x_N2 = sampling.cube(MEASURED, 2, generator)
    noise_N1 = NOISE * torch.randn(MEASURED, 1, dtype=torch.float64, generator=generator)
    return {"interior": sampling.cube(INSIDE, 2, generator), "measured": (x_N2, solution(x_N2) + noise_N1)}


@cache
def evaluation() -> Tensor:
    """Return a grid of 50 times and 101 places."""
    return sampling.grid(sampling.linspace(0, 1, 50), sampling.linspace(0, 1, 101))


def noise_alone() -> float:
    """Return the relative standard deviation of the best estimate of κ by somebody who knows both waves at the start.

    It is σ / ‖∂u/∂κ‖ / κ over the points of the measurements, here those of seed 0.
    """
    x_N2 = points(sampling.generator(0))["measured"][0]
    true = torch.tensor(DIFFUSIVITY, dtype=torch.float64)
    slope_N1 = jacfwd(lambda diffusivity: waves(x_N2, diffusivity))(true)
    return (NOISE / slope_N1.norm() / DIFFUSIVITY).item()


def _note() -> str:
    return (
        f"The noise alone leaves an error of about {noise_alone():.1g} to somebody who knows both waves at the start: "
        "which of several lower errors is lowest is chance."
    )


def error_of_diffusivity(problem: Problem, model: nn.Module) -> float:
    """Return |κ − 0.1| / 0.1."""
    assert isinstance(model, WithDiffusivity)
    return abs(model.diffusivity.item() / DIFFUSIVITY - 1)


PROBLEM = Problem(
    name="inverse",
    title="the diffusivity of the heat equation, from 200 noisy measurements",
    source="this study",
    build=build,
    terms=terms,
    points=points,
    fresh_every=0,
    solution=solution,
    evaluation=evaluation,
    weights={"measured": 100.0},
    measured="relative error of the diffusivity",
    measure=error_of_diffusivity,
    note=_note,
)
