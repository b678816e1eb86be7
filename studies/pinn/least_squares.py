"""The entrant from scipy: `least_squares`, a trust region with a singular value decomposition of J at each iteration.

Key: N rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from studies.pinn.entrants import Build, Entrant
from studies.pinn.problems.base import Problem, inputs_of

LARGEST = 1 << 22  # numbers of J: the decomposition of a larger one takes a minute
TOLERANCE = 1e-15  # scipy wants one above the distance of 1 to the next float
Array = NDArray[np.float64]


class TooLargeError(ValueError):
    """A problem has more rows and parameters than a dense solver takes."""


class Terms(nn.Module):
    """The residual functions of a model as a module with its parameters, for `torch.func`."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.terms = problem.terms(model)

    def forward(self, name: str, *inputs: Tensor) -> Tensor:
        """Return the residuals of a term."""
        return self.terms[name](*inputs)


class Rows:
    """The residuals √(w / n) r of all terms as one vector [N], and their Jacobian [N, P]."""

    def __init__(self, problem: Problem, model: nn.Module, points: Mapping[str, Any]) -> None:
        self.model, self.terms = model, Terms(problem, model)
        self.points = {name: inputs_of(given) for name, given in points.items()}
        self.weights = {name: problem.weights.get(name, 1.0) for name in points}
        count = sum(len(inputs[0]) for inputs in self.points.values())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if count * parameters > LARGEST:
            raise TooLargeError(f"{count} rows of {parameters} parameters are too many for a dense solver")

    def put(self, parameters_P: Array) -> None:
        """Give the model new parameters."""
        vector_to_parameters(torch.from_numpy(parameters_P).clone(), self.model.parameters())

    @torch.no_grad()
    def residuals(self, parameters_P: Array) -> Array:
        """Return r [N]."""
        self.put(parameters_P)
        parts = [self._scaled(name, self.terms(name, *inputs).flatten()) for name, inputs in self.points.items()]
        return torch.cat(parts).numpy()

    def jacobian(self, parameters_P: Array) -> Array:
        """Return J [N, P]."""
        self.put(parameters_P)
        tensors = {name: parameter.detach() for name, parameter in self.terms.named_parameters()}
        return torch.cat([self._jacobian_of(name, tensors) for name in self.points]).numpy()

    def _jacobian_of(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        def of_point(parameters: dict[str, Tensor], *point: Tensor) -> Tensor:
            row = functional_call(self.terms, parameters, (name, *(x[None] for x in point)))
            return row.flatten()

        inputs = self.points[name]
        in_dims = (None, *(0 for _ in inputs))
        parts = vmap(jacrev(of_point), in_dims=in_dims)(tensors, *inputs)
        rows = [parts[key].reshape(-1, parameter.numel()) for key, parameter in tensors.items()]
        return self._scaled(name, torch.cat(rows, 1))

    def _scaled(self, name: str, rows: Tensor) -> Tensor:
        return math.sqrt(self.weights[name] / len(rows)) * rows


def trust_region(problem: Problem, model: nn.Module) -> Entrant:
    """Return `scipy.optimize.least_squares`; its one step ends when it converges, or with the time."""

    def step(points: Mapping[str, Any]) -> None:
        rows = Rows(problem, model, points)

        def after_iteration(intermediate_result: Any) -> None:
            rows.put(intermediate_result.x)
            entrant.pause()

        first_P = parameters_to_vector(model.parameters()).detach().numpy().copy()
        tolerances = {"ftol": TOLERANCE, "xtol": TOLERANCE, "gtol": TOLERANCE, "max_nfev": 1 << 30}
        found = least_squares(rows.residuals, first_P, rows.jacobian, callback=after_iteration, **tolerances)
        rows.put(found.x)

    setting = "trust region reflective, exact, the same points throughout"
    entrant = Entrant("scipy's least_squares", setting, step, fixed_points=True, loops=True)
    return entrant


FAMILIES: dict[str, dict[str, Build]] = {"least-squares": {"trf": trust_region}}
