"""The least-squares problem of a network and an equation: its loss and its rows, for every rival here.

The loss is L = Σ_t w_t mean(r_t²). With √(w_t / N_t) r_t of all terms stacked as r, and J the Jacobian of r, L = rᵀr.

For a network of Linear and Tanh and an equation that is linear in u, J is kept as what each layer read and what came
back, and products with it never form it. For all others the rows are those of torch.func.

Key: N points or rows, M residuals of a point, P parameters, D coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from typing_extensions import override

from studies.pinn.problems.base import Problem, Residual, inputs_of
from studies.pinn.rivals import taylor
from studies.pinn.rivals.operators import Operator, operators_of
from studies.pinn.rivals.rows import DenseRows, FactoredRows, Rows
from studies.pinn.rivals.taylor import LayerTape


def least_squares(problem: Problem, model: nn.Module) -> LeastSquares:
    """Return the least-squares problem of a network, with rows as factors where they can be."""
    layers = taylor.linear_layers(model)
    if layers is not None:
        operators = operators_of(problem, list(problem.terms(model)), layers[0].in_features)
        if operators is not None:
            return LinearSquares(problem, model, layers, operators)
    return GeneralSquares(problem, model)


class LeastSquares(ABC):
    """A problem's loss and rows for one model.

    Attributes:
        terms: the residual functions.
        parameters: the trained parameters, in the order of ``model.parameters()``.
    """

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        self.problem = problem
        self.terms = problem.terms(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(self, points: Mapping[str, Any]) -> float:
        """Return L."""
        return sum(self.weight(name) * self.residual(name, points).square().mean().item() for name in self.terms)

    def weight(self, name: str) -> float:
        """Return w of a term."""
        return float(self.problem.weights.get(name, 1.0))

    def scale(self, name: str, count: int) -> float:
        """Return √(w / n), which makes a term the squared norm of its n residuals."""
        return math.sqrt(self.weight(name) / count)

    @abstractmethod
    def residual(self, name: str, points: Mapping[str, Any]) -> Tensor:
        """Return the residuals of a term, without a graph."""

    @abstractmethod
    def rows(self, points: Mapping[str, Any]) -> Rows:
        """Return r and J at these points."""


class LinearSquares(LeastSquares):
    """The least-squares problem of a chain of Linear and Tanh and an equation that is linear in u.

    Attributes:
        layers: the linear layers.
        operators: what each term's residual does to u.
    """

    def __init__(
        self, problem: Problem, model: nn.Module, layers: list[nn.Linear], operators: dict[str, Operator]
    ) -> None:
        super().__init__(problem, model)
        self.layers, self.operators = layers, operators
        self._sources: dict[str, tuple[Tensor, Tensor]] = {}
        self._check()

    @override
    @torch.no_grad()
    def residual(self, name: str, points: Mapping[str, Any]) -> Tensor:
        return taylor.apply(self.layers, self.operators[name], points[name]).add_(self._source(name, points[name]))

    @override
    @torch.no_grad()
    def rows(self, points: Mapping[str, Any]) -> FactoredRows:
        residuals, tapes = [], []
        for name, operator in self.operators.items():
            value_N, layers = taylor.record(self.layers, operator, points[name])
            scale = self.scale(name, len(value_N))
            residuals.append(scale * (value_N + self._source(name, points[name])))
            tapes.append([LayerTape(tape.input_CNI, scale * tape.grad_CNO) for tape in layers])
        return FactoredRows(torch.cat(residuals), tapes)

    def _check(self) -> None:
        """Compare the residuals with the problem's own at three points, which also imports what torch.func takes.

        Raises:
            ValueError: if they differ.
        """
        like = self.parameters[0]
        x_ND = torch.linspace(0.1, 0.9, 3).to(like)[:, None].repeat(1, self.layers[0].in_features)
        for name, residual in self.terms.items():
            expected_N = residual(x_ND).detach().flatten()
            if not torch.allclose(self.residual(name, {name: x_ND}), expected_N, rtol=1e-4, atol=1e-5):
                raise ValueError(f"term {name!r} of {self.problem.name} is not {self.operators[name]}")

    def _source(self, name: str, x_ND: Tensor) -> Tensor:
        """Return the residuals of a term for u = 0, ``[N]``: kept while the points are the same tensor."""
        if name not in self._sources or self._sources[name][0] is not x_ND:
            zero = nn.Sequential(nn.Linear(x_ND.shape[1], 1)).to(x_ND)
            for parameter in zero.parameters():
                nn.init.zeros_(parameter)
            self._sources[name] = (x_ND, self.problem.terms(zero)[name](x_ND).detach().flatten())
        return self._sources[name][1]


class GeneralSquares(LeastSquares):
    """The least-squares problem of any model and any residual functions, each of which treats its points one by one."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__(problem, model)
        self._modules = {name: _Term(model, residual) for name, residual in self.terms.items()}

    @override
    def residual(self, name: str, points: Mapping[str, Any]) -> Tensor:
        return self.terms[name](*inputs_of(points[name])).detach()

    def residuals(self, points: Mapping[str, Any]) -> Tensor:
        """Return r, ``[N]``."""
        parts = [self.residual(name, points).flatten() for name in self.terms]
        return torch.cat([self.scale(name, len(part)) * part for name, part in zip(self.terms, parts, strict=True)])

    @override
    def rows(self, points: Mapping[str, Any]) -> DenseRows:
        residuals, jacobians = [], []
        for name, module in self._modules.items():
            residual_N, jacobian_NP = _pointwise_rows(module, inputs_of(points[name]))
            scale = self.scale(name, len(residual_N))
            residuals.append(scale * residual_N)
            jacobians.append(scale * jacobian_NP)
        return DenseRows(torch.cat(residuals), torch.cat(jacobians))


class _Term(nn.Module):
    """A residual function with the model as a part of it, so that torch.func can put other parameters there."""

    def __init__(self, model: nn.Module, residual: Residual) -> None:
        super().__init__()
        self.model = model
        self.residual = (residual,)  # in a tuple: functional_call does not restore a module that is found twice

    @override
    def forward(self, *points: Tensor) -> Tensor:
        return self.residual[0](*points)


def _pointwise_rows(module: _Term, points: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the residuals of a term, ``[N M]``, and their Jacobian, ``[N M, P]``, by torch.func, a point at a time."""
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def at(parameters: dict[str, Tensor], *point: Tensor) -> tuple[Tensor, Tensor]:
        values_M = functional_call(module, parameters, tuple(x[None] for x in point)).flatten()
        return values_M, values_M

    jacobian = vmap(jacrev(at, has_aux=True), in_dims=(None, *(0 for _ in points)))
    by_name, residual_NM = jacobian(trained, *points)
    blocks = [by_name[name].reshape(residual_NM.numel(), -1) for name in trained]
    return residual_NM.detach().flatten(), torch.cat(blocks, 1).detach()
