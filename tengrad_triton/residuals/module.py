"""Residual terms as one module, for optimizers that take a model and a loss.

Dimensions: N points of a term, M residuals at each, R residuals of all terms, K entries of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.residuals.rows import RowFinder
from tengrad_triton.residuals.terms import Residual, Terms


class Residuals(nn.Module):
    """All residuals of several terms, as one model with one output for each.

    The mean square of its output is the loss of `GaussNewton`, Σ_t w_t mean(r_t²), so that `TENGraD` takes the same
    terms: the samples are the residuals, and their rows are found as `GaussNewton` finds them.

        model = Residuals(u, {"interior": equation, "boundary": u}, weights={"boundary": 10.0})
        optimizer = TENGraD(model, likelihood="gaussian", fisher="exact", blocks="network", ...)
        loss = model(interior=inside, boundary=edge).square().mean()

    Args:
        model: the module whose parameters are trained.
        residuals: for each term, by a name of yours, a function of a batch of points that returns their residuals [N]
            or [N, …]: a closure over the model, or a module.
        weights: w_t of the terms whose weight is not 1.

    Raises:
        TypeError: a residual function is no function, or a weight no number.
        ValueError: there is no residual, or a weight is not positive or belongs to no term.
    """

    def __init__(
        self, model: nn.Module, residuals: Mapping[str, Residual], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._terms = Terms(model, residuals, weights)
        self._finder = RowFinder(self._terms)

    @override
    def forward(self, **points: Any) -> Tensor:
        """Return the residuals [R], each times √(w_t R / (N_t M_t)).

        Args:
            points: for each term, by its name, the points [N, …], or a tuple of tensors.

        Raises:
            TypeError: a term is missing or unknown, or a residual function returned no tensor of real numbers.
            ValueError: points are not finite, or there are none; or a residual function returned no batch.
        """
        r_R = self._terms.values(self._terms.points_of(points), with_graph=torch.is_grad_enabled())
        return len(r_R) ** 0.5 * r_R

    def rows_of_outputs(self, parameters: Mapping[str, Tensor], points: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the derivatives [R, *parameter.shape] of every output with respect to parameters, by their names."""
        named, tensors = self._terms.points_of(points), list(parameters.values())
        counts = self._terms.counts(named)
        total, found = sum(counts.values()), []
        for term in self._terms.terms:
            scale = total**0.5 * term.scale_of(counts[term.name])
            _, rows = self._finder.of_term(term, tensors, named[term.name])
            found.append([scale * part for part in rows])
        return {name: torch.cat(parts) for name, parts in zip(parameters, zip(*found, strict=True), strict=True)}
