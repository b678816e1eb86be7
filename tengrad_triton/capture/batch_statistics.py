"""Detached batch statistics: a backward pass through a batch norm that does not mix samples.

In training, the statistics of a batch norm depend on all samples of the batch. The gradient of the loss goes through
them, as torch defines it. A row of J belongs to one sample, so the backward passes that compute rows treat the
statistics as constants. A function at the output of the batch norm can do both; a flag decides for each backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.hook import donated_buffers_explained, protect_retained
from tengrad_triton.layers.batch_norm import broadcast, statistics


class ScopedFlag:
    """A flag that several objects share. It is set only within ``with flag.set():``."""

    def __init__(self) -> None:
        self.is_set = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """Set the flag, and restore its former value when the context ends."""
        before, self.is_set = self.is_set, True
        try:
            yield
        finally:
            self.is_set = before


@dataclass(frozen=True)
class PassFlags:
    """The flags of one capture.

    Attributes:
        own: this pass, or this forward, is one of ours: the hooks ignore it.
        detached: batch statistics are constants in this backward pass.
        affine: this backward pass, with detached statistics, needs the gradients of the batch norms' own parameters.
    """

    own: ScopedFlag = field(default_factory=ScopedFlag)
    detached: ScopedFlag = field(default_factory=ScopedFlag)
    affine: ScopedFlag = field(default_factory=ScopedFlag)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Set ``own`` for passes of ours, which leave what the user's tensors have retained as it is."""
        with self.own.set(), protect_retained(), donated_buffers_explained():
            yield

    @contextmanager
    def rows(self, *, affine: bool = False) -> Iterator[None]:
        """Set the flags for a backward pass that computes rows."""
        with ExitStack() as stack:
            for flag in (self.own, self.detached, *([self.affine] if affine else [])):
                stack.enter_context(flag.set())
            yield


class _DetachedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, layer: nn.Module, flags: PassFlags
    ) -> Tensor:
        mean_C, inverse_C = statistics(layer, x)  # type: ignore[arg-type] # the hook is on batch norms only
        scale_C = inverse_C if weight is None else inverse_C * weight
        ctx.save_for_backward(x, *(broadcast(v_C, x) for v_C in (scale_C, mean_C, inverse_C)))
        ctx.flags, ctx.has_affine = flags, weight is not None
        ctx.mark_dirty(y)  # y is not written to; marking it lets autograd return y itself instead of a copy
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.flags.detached.is_set:
            return (None, grad, None, None, None, None)
        x, scale, mean, inverse = ctx.saved_tensors
        weight_grad, bias_grad = None, None
        if ctx.flags.affine.is_set and ctx.has_affine:
            dims = [0, *range(2, x.dim())]
            weight_grad, bias_grad = (grad * (x - mean) * inverse).sum(dims), grad.sum(dims)
        return (grad * scale, None, weight_grad, bias_grad, None, None)


def with_detached_statistics(layer: nn.Module, x: Tensor, y: Tensor, flags: PassFlags) -> Tensor:
    """Return ``y`` with a backward pass that the flags switch between two derivatives.

    Args:
        layer: a batch norm.
        x: its input, [N, C, *].
        y: its output.
        flags: while ``detached`` is set, the gradient of ``x`` is that for constant statistics. The gradients of the
            layer's own parameters are computed then only if ``affine`` is set too: they cost a pass over the data.
            Otherwise the backward pass goes through the batch norm and its statistics.
    """
    out: Tensor = _DetachedStatistics.apply(x, y, layer.weight, layer.bias, layer, flags)
    return out
