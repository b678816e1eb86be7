"""Detached batch statistics: a backward pass through a batch norm that does not mix samples.

In training, the statistics of a batch norm depend on all samples of the batch. The gradient of the loss goes through
them, as torch defines it. A row of J belongs to one sample, so the backward passes that compute rows treat the
statistics as constants. A function at the output of the batch norm can do both; a flag decides for each backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.flag import ScopedFlag


class _DetachedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, detached: ScopedFlag) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.detached = detached
        ctx.mark_dirty(y)  # y is not written to; marking it lets autograd return y itself instead of a copy
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale, None, None, None) if ctx.detached.is_set else (None, grad, None, None)


def with_detached_statistics(x: Tensor, y: Tensor, scale: Tensor, detached: ScopedFlag) -> Tensor:
    """Return ``y`` with a backward pass that the flag ``detached`` switches between two derivatives.

    Args:
        x: the input of a batch norm, [N, C, *].
        y: its output.
        scale: the derivative of ``y`` with respect to ``x`` for constant statistics, [1, C, 1, …].
        detached: while it is set, the gradient of ``x`` is ``scale`` times that of ``y``. Otherwise the backward pass
            goes through the batch norm and its statistics.
    """
    out: Tensor = _DetachedStatistics.apply(x, y, scale, detached)
    return out
