"""Poisson's equation −Δu = f on the unit cube, with the boundary values of a known solution.

Equations, networks, numbers of points and how often they are drawn: Dangel, Müller and Zeinhofer, "Kronecker-Factored
Approximate Curvature for Physics-Informed Neural Networks" (2024), with the settings of their published runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from studies.pinn.problems import sampling
from studies.pinn.problems.base import Field, Points, Problem, Residual, mlp
from tengrad_triton import laplacian

SOURCE = "Dangel, Müller and Zeinhofer (2024)"
NORM = 1.34  # their normalization of the polynomial in ten dimensions


def sine_product(x_ND: Tensor) -> Tensor:
    """Return Π sin(π x_d)."""
    return torch.sin(math.pi * x_ND).prod(1, keepdim=True)


def sine_product_source(x_ND: Tensor) -> Tensor:
    """Return D π² Π sin(π x_d)."""
    return x_ND.shape[1] * math.pi**2 * sine_product(x_ND)


def cosine_sum(x_ND: Tensor) -> Tensor:
    """Return Σ cos(π x_d)."""
    return torch.cos(math.pi * x_ND).sum(1, keepdim=True)


def cosine_sum_source(x_ND: Tensor) -> Tensor:
    """Return π² Σ cos(π x_d)."""
    return math.pi**2 * cosine_sum(x_ND)


def pair_products(x_ND: Tensor) -> Tensor:
    """Return the harmonic polynomial (x₁x₂ + x₃x₄ + …) / 1.34."""
    return x_ND.unflatten(1, (-1, 2)).prod(2).sum(1, keepdim=True) / NORM


def no_source(x_ND: Tensor) -> Tensor:
    """Return 0 at each point."""
    return torch.zeros_like(x_ND[:, :1])


def terms(solution: Field, source: Field, u: nn.Module) -> dict[str, Residual]:
    """Return the residuals Δu + f inside, and u − g on the boundary."""
    return {
        "interior": lambda x_ND: laplacian(u, x_ND) + source(x_ND),
        "boundary": lambda x_ND: u(x_ND) - solution(x_ND),
    }


def points(dimension: int, inside: int, boundary: int, generator: torch.Generator) -> Points:
    """Draw points inside the cube and on its boundary."""
    return {
        "interior": sampling.cube(inside, dimension, generator),
        "boundary": sampling.sides(boundary, dimension, generator),
    }


@cache
def evaluation(count: int, dimension: int) -> Tensor:
    """Return the points [N, D] of the error, uniform in the cube."""
    return sampling.cube(count, dimension, sampling.generator(sampling.EVALUATION_SEED))


def _problem(
    dimension: int,
    hidden: Sequence[int],
    functions: tuple[Field, Field],
    counts: tuple[int, int],
    fresh_every: int,
    solved_by: str,
) -> Problem:
    """Return a problem; ``functions`` are u and f, ``counts`` the points inside and on the boundary."""
    inside, boundary = counts
    return Problem(
        name=f"poisson{dimension}d",
        title=f"Poisson's equation in {dimension} dimensions, u = {solved_by}",
        source=SOURCE,
        build=partial(mlp, dimension, *hidden, 1),
        terms=partial(terms, *functions),
        points=partial(points, dimension, inside, boundary),
        fresh_every=fresh_every,
        solution=functions[0],
        evaluation=partial(evaluation, 10 * inside, dimension),
    )


PROBLEMS = (
    _problem(2, [64], (sine_product, sine_product_source), (900, 120), 0, "Π sin(πx)"),
    _problem(5, [64], (cosine_sum, cosine_sum_source), (3000, 500), 1, "Σ cos(πx)"),
    _problem(10, [256, 256, 128, 128], (pair_products, no_source), (3000, 1000), 1, "(x₁x₂ + x₃x₄ + …) / 1.34"),
)
