"""What a framework has to know of a problem: its equation, in derivatives of the framework's own, and the values of u.

The residual of every other term is u less what it shall be, so these values follow from the problem: where the network
is 0, minus the residual is the value.

Key: N points, D coordinates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from studies.pinn.problems import burgers, convection, heat, inverse, poisson
from studies.pinn.problems.base import Field, Problem, inputs_of

EQUATION, PERIODIC = "interior", "periodic"  # the terms that are no values of u


class Solution(Protocol):
    """The network's u at points, with derivatives that a framework takes.

    Attributes:
        x_ND: the points.
        u_N1: the values.
    """

    x_ND: Tensor
    u_N1: Tensor

    def first(self, coordinate: int) -> Tensor:
        """Return ∂u/∂x_d [N, 1]."""

    def second(self, coordinate: int) -> Tensor:
        """Return ∂²u/∂x_d² [N, 1]."""


Equation = Callable[[Solution, nn.Module], Tensor]
"""Returns the residual [N, 1], given u and the model that it is of, which may have unknown coefficients."""


def _laplacian(u: Solution, first_coordinate: int = 0) -> Tensor:
    seconds = [u.second(d) for d in range(first_coordinate, u.x_ND.shape[1])]
    return sum(seconds[1:], seconds[0])


def _poisson(source: Field) -> Equation:
    return lambda u, _: _laplacian(u) + source(u.x_ND)


def _heat(u: Solution, _: nn.Module) -> Tensor:
    return u.first(0) - heat.DIFFUSIVITY * _laplacian(u, 1)


def _burgers(u: Solution, _: nn.Module) -> Tensor:
    return u.first(0) + u.u_N1 * u.first(1) - burgers.VISCOSITY * u.second(1)


def _convection(u: Solution, _: nn.Module) -> Tensor:
    return u.first(0) + convection.SPEED * u.first(1)


def _inverse(u: Solution, model: nn.Module) -> Tensor:
    assert isinstance(model, inverse.WithDiffusivity)
    return u.first(0) - model.diffusivity * u.second(1)


EQUATIONS: dict[str, Equation] = {
    "poisson2d": _poisson(poisson.sine_product_source),
    "poisson5d": _poisson(poisson.cosine_sum_source),
    "poisson10d": _poisson(poisson.no_source),
    "heat1d": _heat,
    "heat4d": _heat,
    "burgers": _burgers,
    "convection": _convection,
    "convection-fresh": _convection,
    "inverse": _inverse,
}


@dataclass(frozen=True)
class Statement:
    """A problem at its points.

    Attributes:
        equation: returns the residual [N, 1] of the equation, given u.
        inside_ND: its points.
        values: points [N, D] and values of u [N, 1] there, by term.
        periodic: pairs of points [N, D] at which u is the same, by term.
        weights: the weight of each term in the loss Σ w mean(r²), the equation first, then values, then pairs.
    """

    equation: Callable[[Solution], Tensor]
    inside_ND: Tensor
    values: Mapping[str, tuple[Tensor, Tensor]]
    periodic: Mapping[str, tuple[Tensor, Tensor]]
    weights: Mapping[str, float]


def equation_of(problem: Problem) -> Equation:
    """Return the equation of a problem; raises `ValueError` if none is written."""
    if problem.name not in EQUATIONS:
        raise ValueError(f"the equation of {problem.name} is not written for a framework's own derivatives")
    return EQUATIONS[problem.name]


def state(problem: Problem, model: nn.Module, points: Mapping[str, Any]) -> Statement:
    """Return a problem at points; raises `ValueError` if its equation is not written."""
    equation = equation_of(problem)
    others = {name: inputs_of(given) for name, given in points.items() if name != EQUATION}
    periodic = {name: (given[0], given[1]) for name, given in others.items() if name == PERIODIC}
    residuals = problem.terms(_zero(model))
    with torch.no_grad():
        values = {n: (given[0], -residuals[n](*given)) for n, given in others.items() if n not in periodic}
    names = [EQUATION, *values, *periodic]
    weights = {name: problem.weights.get(name, 1.0) for name in names}
    return Statement(lambda u: equation(u, model), points[EQUATION], values, periodic, weights)


def _zero(model: nn.Module) -> nn.Module:
    """Return a network that is 0 everywhere, of the same class."""
    zero = copy.deepcopy(model)
    for parameter in zero.parameters():
        parameter.data.zero_()
    return zero
