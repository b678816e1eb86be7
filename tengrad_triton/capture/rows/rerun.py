"""Rows from running a module again under `torch.func`, and rows from one backward pass for each sample.

Running a module again costs a forward and a backward of that module. The rows are exact only if the module computes the
same function again, so the caller compares their sum with the gradient that autograd computed (`sums_to`).

Dimensions: N samples, R cotangents; "j_N…" is [N, *parameter.shape].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from tengrad_triton.capture.record import LayerCall
from tengrad_triton.capture.rows.unobserved import unobserved
from tengrad_triton.layers import tensors_in
from tengrad_triton.layers.stateless import call_with, places_of
from tengrad_triton.sharding.modules import takes_single_passes

_CHUNK_BYTES = 256 * 2**20  # one `vmap` computes rows of at most this size
_SAMPLES_PER_PASS = 16  # the backward passes of this many samples are batched into one


def rerun_rows(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    calls: Sequence[LayerCall],
    samples: int,
    scale: int,
    outputs_of: Callable[[Any], Sequence[Tensor]] = tensors_in,
) -> dict[str, Tensor]:
    """Return the rows j_N… of parameters, summed over the calls of their layer, by vector-Jacobian products.

    Args:
        layer: the layer to run again.
        parameters: the parameters whose rows to find, by their names within ``layer``.
        calls: recorded calls of the layer; calls without output gradients are left out.
        samples: N.
        scale: a factor that multiplies the output gradients.
        outputs_of: returns the tensors, among what the layer returns, that the output gradients belong to.

    Raises:
        RuntimeError: `torch.func` cannot transform what the layer does.
    """
    with ignore_vmap_warning(), torch.no_grad(), unobserved(layer):
        with_grads = [call for call in calls if call.has_grads]
        rows = [_rows_of_call(layer, parameters, call, samples, scale, outputs_of) for call in with_grads]
    return {name: torch.stack([part[name] for part in rows]).sum(0) for name in parameters}


def _rows_of_call(
    layer: nn.Module,
    parameters: Mapping[str, Tensor],
    call: LayerCall,
    samples: int,
    scale: int,
    outputs_of: Callable[[Any], Sequence[Tensor]],
) -> dict[str, Tensor]:
    leaves, spec = tree_flatten((call.call.args, dict(call.call.kwargs)))
    is_batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples for leaf in leaves]
    with_grads = [index for index, grad in enumerate(call.output_grads) if grad is not None]
    detached, places = {name: p.detach() for name, p in parameters.items()}, places_of(layer)

    def one_sample(batched: list[Tensor], cotangents: list[Tensor]) -> Any:
        """Return the rows of one sample; ``batched`` holds its slices of the arguments."""
        rest = iter(batched)
        slices = [next(rest)[None] if b else leaf for b, leaf in zip(is_batched, leaves, strict=True)]
        args, kwargs = tree_unflatten(slices, spec)

        def forward(parameters: Mapping[str, Tensor]) -> list[Tensor]:
            buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            outputs = outputs_of(call_with(layer, places, {**buffers, **parameters}, args, kwargs))
            return [outputs[index] for index in with_grads]

        transformed: Any = vjp(forward, detached)
        return transformed[1]([cotangent[None] for cotangent in cotangents])[0]

    row_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    batched = [leaf for b, leaf in zip(is_batched, leaves, strict=True) if b]
    cotangents = [scale * grad for grad in call.output_grads if grad is not None]
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    return vmap(one_sample, randomness="error", chunk_size=chunk)(batched, cotangents)


@contextmanager
def ignore_vmap_warning() -> Iterator[None]:
    """Ignore torch's warning that `vmap` runs an operation in a loop because it cannot batch it."""
    if torch.compiler.is_compiling():  # traced code cannot change warning filters; its caller does
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def sums_to(rows_N: Tensor, total: Tensor) -> bool:
    """Whether the sum of the rows equals a gradient within sqrt(eps), relative to the rows' norms.

    Rounding errors are much smaller, and the gradient of another function differs much more.
    """
    size = rows_N.reshape(len(rows_N), -1).norm(dim=1).sum()
    off = (rows_N.sum(0) - total).norm()
    return bool(off <= torch.finfo(rows_N.dtype).eps ** 0.5 * size)


def backward_rows(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[Tensor], samples: int
) -> list[Tensor]:
    """Return the rows j_N… of parameters by backward passes through the graph of ``outputs``, one for each sample.

    Args:
        outputs: the tensors [N, …] at which the passes start.
        cotangents: for each output, the derivatives [N, …] of the samples' losses with respect to it.
        parameters: the parameters whose rows to find.
        samples: N.
    """
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for first in range(0, samples, _SAMPLES_PER_PASS):
        chosen = range(first, min(samples, first + _SAMPLES_PER_PASS))
        masked = [torch.stack([_only_sample(cotangent, n) for n in chosen]) for cotangent in cotangents]
        for grads in batched_grads(outputs, parameters, masked):
            for found, parameter, grad in zip(rows, parameters, grads, strict=True):
                found.append(torch.zeros_like(parameter) if grad is None else grad.detach())
    return [torch.stack(found) for found in rows]


def _only_sample(cotangent: Tensor, sample: int) -> Tensor:
    """Return the cotangent with zeros for every other sample."""
    masked = torch.zeros_like(cotangent)
    masked[sample] = cotangent[sample]
    return masked


def batched_grads(
    outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> Iterator[Sequence[Tensor | None]]:
    """Yield, for r = 1 … R, the derivatives of Σ ⟨cotangent_r, output⟩ with respect to ``inputs``.

    Args:
        outputs: the tensors at which the backward passes start.
        inputs: tensors or edges of the graph, with respect to which the derivatives are taken.
        cotangents: for each output, R cotangents [R, *output.shape].
    """
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    batched = None if takes_single_passes() else _in_one_pass(outputs, inputs, cotangents, options)
    if batched is None:
        for single in zip(*cotangents, strict=True):
            yield torch.autograd.grad(outputs, inputs, single, **options)
        return
    for index in range(len(cotangents[0])):
        yield [None if grads is None else grads[index] for grads in batched]


def _in_one_pass(
    outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor], options: Mapping[str, Any]
) -> Sequence[Tensor | None] | None:
    """Return all the derivatives; None where an operation cannot be batched, or memory is too small."""
    try:
        with ignore_vmap_warning():
            return torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options)
    except RuntimeError:
        return None
