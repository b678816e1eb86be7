"""Evaluations of the residuals within one step: at any parameters, with the same random numbers and buffers each time.

Dimensions: R residuals, K entries of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass
class Randomness:
    """The states of the random number generators that a residual function may use."""

    states: dict[torch.device, Tensor]

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """Return the present states, of the CPU and of a GPU in use."""
        states = {torch.device("cpu"): torch.get_rng_state()}
        if device.type == "cuda":
            states[device] = torch.cuda.get_rng_state(device)
        return cls(states)

    def restore(self) -> None:
        """Set the generators back."""
        for device, state in self.states.items():
            torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


class Evaluations:
    """The residuals as a function of the parameters, for one step.

    Args:
        terms: of the loss.
        model: whose buffers an evaluation may change.
        parameters: the trained ones.
        points: of the step.
    """

    def __init__(self, terms: Terms, model: nn.Module, parameters: Sequence[Tensor], points: Points) -> None:
        self._terms, self._parameters, self._points = terms, parameters, points
        self._buffers = list(model.buffers())
        self.start_K = flatten(parameters)
        self._random = Randomness.now(parameters[0].device)
        self._buffers_before = [b.clone() for b in self._buffers]

    def rewind(self) -> None:
        """Set random numbers and buffers back to where the step began."""
        self._random.restore()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)

    def at(self, theta_K: Tensor) -> Tensor:
        """Return r̃ [R] at other parameters, which stay in the model."""
        self.rewind()
        write_(self._parameters, theta_K)
        return self._terms.values(self._points)

    def at_many(self, thetas_TK: Tensor) -> Tensor:
        """Return r̃ at several parameters, [T, R]: in one batch where `torch.func` can run the residual functions so."""
        values = self._terms.batched_values(self._points, self._parameters, thetas_TK)
        return torch.stack([self.at(theta_K) for theta_K in thetas_TK]) if values is None else values

    @contextmanager
    def kept_if_taken(self) -> Iterator[list[bool]]:
        """Within the context, try parameters; at its end all is as at the start, unless the list has got a True.

        Random numbers and buffers then go on from where the first evaluation, which the caller has made, left them.
        """
        random, buffers = Randomness.now(self._parameters[0].device), [b.clone() for b in self._buffers]
        taken: list[bool] = []
        try:
            yield taken
        finally:
            if taken:
                random.restore()
                if buffers:
                    torch._foreach_copy_(self._buffers, buffers)
            else:
                self.undo()

    def undo(self) -> None:
        """Set parameters, random numbers and buffers back to where the step began."""
        self.rewind()
        write_(self._parameters, self.start_K)
