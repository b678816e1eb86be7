"""Rows of parameters that no rule describes: by running their module again, or by a backward pass a sample.

Running one module again under `torch.func` costs a forward and a backward pass of that module. It is the same
function only if nothing in it is random or depends on other samples, so its rows are compared with the gradient that
autograd found: Σ_n J_n has to be it. Where it is not, the graph itself is asked, one sample after the other.

Dimensions: N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tengrad_triton.capture.record import LayerCall

_CHUNK_BYTES = 256 * 2**20  # rows formed at a time
_TOGETHER = 16  # samples whose backward passes are one batched pass


def rerun_rows(
    layer: nn.Module, parameters: Mapping[str, Tensor], uses: Sequence[LayerCall], samples: int, scale: int = 1
) -> dict[str, Tensor]:
    """Return j_N… of parameters, by their names within ``layer``: vector-Jacobian products of its calls, under `vmap`.

    Raises:
        RuntimeError: torch cannot do that with what the layer does.
    """
    with ignore_vmap_warning(), torch.no_grad():  # but for what the transforms differentiate
        rows = [_rows_of_call(layer, parameters, use, samples, scale) for use in uses if use.has_grads]
    return {name: torch.stack([part[name] for part in rows]).sum(0) for name in parameters}


def _rows_of_call(
    layer: nn.Module, parameters: Mapping[str, Tensor], use: LayerCall, samples: int, scale: int
) -> dict[str, Tensor]:
    leaves, spec = tree_flatten((use.call.args, dict(use.call.kwargs)))
    split = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples for leaf in leaves]
    wanted = [index for index, grad in enumerate(use.output_grads) if grad is not None]
    detached = {name: p.detach() for name, p in parameters.items()}

    def one(batched: list[Tensor], cotangents: list[Tensor]) -> Any:
        rest = iter(batched)
        args, kwargs = tree_unflatten([next(rest)[None] if s else x for s, x in zip(split, leaves, strict=True)], spec)

        def forward(parameters: Mapping[str, Tensor]) -> list[Tensor]:
            buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            outputs = functional_call(layer, {**buffers, **parameters}, args, kwargs)
            tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
            return [tensors[index] for index in wanted]

        transformed: Any = vjp(forward, detached)
        return transformed[1]([cotangent[None] for cotangent in cotangents])[0]

    entries = sum(p.numel() * p.element_size() for p in parameters.values())
    batched = [leaf for s, leaf in zip(split, leaves, strict=True) if s]
    cotangents = [scale * grad for grad in use.output_grads if grad is not None]
    return vmap(one, randomness="error", chunk_size=max(1, _CHUNK_BYTES // entries))(batched, cotangents)


@contextmanager
def ignore_vmap_warning() -> Iterator[None]:
    """Keep torch from warning that `vmap` loops over an operation: it is right, and there is no other way."""
    if torch.compiler.is_compiling():  # who compiles has to be ignore_vmap_warning
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def sums_to(rows_N: Tensor, total: Tensor) -> bool:
    """Whether rows sum up to a gradient, to half the digits: rounding is far below that, another function is not."""
    size = rows_N.flatten(1).norm(dim=1).sum()
    off = (rows_N.sum(0) - total).norm()
    return bool(off <= torch.finfo(rows_N.dtype).eps ** 0.5 * size)


def backward_rows(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[Tensor], samples: int
) -> list[Tensor]:
    """Return j_N… of parameters from the graph behind ``outputs``: a backward pass for each sample's part of it."""
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for first in range(0, samples, _TOGETHER):
        together = range(first, min(samples, first + _TOGETHER))
        masked = [torch.stack([_only(cotangent, n) for n in together]) for cotangent in cotangents]
        for grads in batched_grads(outputs, parameters, masked):
            for row, parameter, grad in zip(rows, parameters, grads, strict=True):
                row.append(torch.zeros_like(parameter) if grad is None else grad.detach())
    return [torch.stack(row) for row in rows]


def _only(cotangent: Tensor, sample: int) -> Tensor:
    masked = torch.zeros_like(cotangent)
    masked[sample] = cotangent[sample]
    return masked


def batched_grads(
    outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> Iterator[Sequence[Tensor | None]]:
    """Yield the derivatives of Σ ⟨cotangent, output⟩ for each row of cotangents: one backward pass where torch can."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        with ignore_vmap_warning():
            batched = torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options)
    except RuntimeError:  # an operation that has no rule for a batch of backward passes, or too little memory
        for row in zip(*cotangents, strict=True):
            yield torch.autograd.grad(outputs, inputs, row, **options)
        return
    for index in range(len(cotangents[0])):
        yield [None if grads is None else grads[index] for grads in batched]
