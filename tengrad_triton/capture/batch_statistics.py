"""Batch statistics as constants: a backward pass for the Fisher matrix's rows that mixes no samples.

The gradient of the loss goes through the statistics of a batch norm, as torch means it; the rows of J must not, or a
row would be a sum over samples. A switch at the layer's output sends a backward pass the one way or the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Switch:
    """Which way backward passes take at present."""

    def __init__(self) -> None:
        self.constant = False

    @contextmanager
    def constants(self) -> Iterator[None]:
        """Have backward passes take the statistics for constants."""
        self.constant = True
        try:
            yield
        finally:
            self.constant = False


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, switch: Switch) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.switch = switch
        ctx.mark_dirty(y)  # nothing is written; a batch norm does not need its output, and a copy would take memory
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale, None, None, None) if ctx.switch.constant else (None, grad, None, None)


def frozen(x: Tensor, y: Tensor, scale: Tensor, switch: Switch) -> Tensor:
    """Return y = scale ∘ x + constant itself, whose derivative by x is ``scale`` while the switch says constants."""
    out: Tensor = _Frozen.apply(x, y, scale, switch)
    return out
