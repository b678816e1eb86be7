"""The entrant from scipy: `least_squares`, a trust region with a singular value decomposition of J at each iteration.

Key: N rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares  # type: ignore[import-untyped]
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from studies.pinn.entrants import Build, Entrant
from studies.pinn.problems.base import Problem, inputs_of
from studies.pinn.rivals.squares import GeneralSquares

LARGEST = 1 << 22  # numbers of J: the decomposition of a larger one takes a minute
TOLERANCE = 1e-15  # scipy wants one above the distance of 1 to the next float
Array = NDArray[np.float64]


class TooLargeError(ValueError):
    """A problem has more rows and parameters than a dense solver takes."""


class Rows:
    """The residuals √(w / n) r of all terms as one vector [N], and their Jacobian [N, P], for scipy."""

    def __init__(self, problem: Problem, model: nn.Module, points: Mapping[str, Any]) -> None:
        self.model, self.points, self.squares = model, points, GeneralSquares(problem, model)
        count = sum(len(inputs_of(given)[0]) for given in points.values())
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
        return self.squares.residuals(self.points).numpy()

    def jacobian(self, parameters_P: Array) -> Array:
        """Return J [N, P]."""
        self.put(parameters_P)
        return self.squares.rows(self.points).matrix().numpy()


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
