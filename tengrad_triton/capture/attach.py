"""A callback at the model's output: it runs when a backward pass gets there, before that pass goes any further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.outputs import map_tensors

Callback = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
"""Takes the tensors that the model returned, and the derivatives with respect to them."""


class _Together(torch.autograd.Function):
    """Copies tensors, so that one node of the graph gets the derivatives of all of them at once."""

    @staticmethod
    def forward(ctx: Any, callback: Callback, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.callback = callback
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results)
        return tuple(result.clone() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.callback(ctx.saved_tensors, grads)
        return (None, *grads)


def call_on_backward(output: Any, results: Sequence[Tensor], callback: Callback) -> Any:
    """Have a backward pass that reaches ``results`` call back; return the output to use in place of ``output``.

    Hooks on several tensors would be called one after the other, when autograd has freed a part of the graph. And a hook
    that needs its tensor would keep it alive.

    Args:
        output: what the model returned.
        results: the tensors in it that require gradients.
        callback: called in every backward pass that reaches any of them.
    """
    copies = dict(zip(map(id, results), _Together.apply(callback, *results), strict=True))
    return map_tensors(lambda x: copies.get(id(x), x), output)
