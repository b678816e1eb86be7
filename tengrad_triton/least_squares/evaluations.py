"""Evaluations of the residuals within one step: at any parameters, with the same random numbers and buffers each time.

Dimensions: R residuals, K entries of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tengrad_triton.residuals.surroundings import Surroundings
from tengrad_triton.residuals.terms import Points, Terms


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of all tensors as one vector [K], a copy."""
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def write_(tensors: Sequence[Tensor], flat_K: Tensor) -> None:
    """Write a vector [K] into the tensors."""
    parts = flat_K.split([x.numel() for x in tensors])
    torch._foreach_copy_(
        [x.detach() for x in tensors], [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
    )


class Evaluations:
    """The residuals as a function of the parameters, for one step.

    Args:
        terms: of the loss.
        model: whose buffers an evaluation may change.
        parameters: the trained ones.
        points: of the step.
    """

    def __init__(self, terms: Terms, model: nn.Module, parameters: Sequence[Tensor], points: Points) -> None:
        self._terms, self._model, self._parameters, self._points = terms, model, parameters, points
        self.start_K = flatten(parameters)
        self._before = Surroundings.now(model)

    def at(self, theta_K: Tensor) -> Tensor:
        """Return r̃ [R] at other parameters, which stay in the model."""
        self._before.restore()
        write_(self._parameters, theta_K)
        return self._terms.values(self._points)

    def at_many(self, thetas_TK: Tensor) -> Tensor:
        """Return r̃ at several parameters, [T, R]: in one batch where `torch.func` can run the residual functions so.

        The first one is evaluated by itself as well: a batch does not see what a function holds beside the model.
        """
        values_TR = self._terms.batched_values(self._points, self._parameters, thetas_TK)
        if values_TR is not None:
            first_R, eps = self.at(thetas_TK[0]), torch.finfo(values_TR.dtype).eps
            if torch.allclose(values_TR[0], first_R, rtol=eps**0.5, atol=eps**0.75, equal_nan=True):
                return values_TR
        return torch.stack([self.at(theta_K) for theta_K in thetas_TK])

    @contextmanager
    def kept_if_taken(self) -> Iterator[list[bool]]:
        """Within the context, try parameters; at its end all is as at the start, unless the list has got a True.

        Random numbers and buffers then go on from where the first evaluation, which the caller has made, left them.
        """
        after = Surroundings.now(self._model)
        taken: list[bool] = []
        try:
            yield taken
        finally:
            if taken:
                after.restore()
            else:
                self.undo()

    def undo(self) -> None:
        """Set parameters, random numbers and buffers back to where the step began."""
        self._before.restore()
        write_(self._parameters, self.start_K)
