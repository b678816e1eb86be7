"""Checks on the autograd graph of a forward: which layers mix samples, and in which leaf tensors the graph ends.

Dimensions: N samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.layers import samples_dim

CheckedCall = tuple[str, LayerCall, GradientEdge]
"""The name of a layer, one of its calls, and the edge of the graph at the output of that call."""


def mixing_layers(record: Record, results: Sequence[Tensor], layers: Mapping[str, CapturedLayer]) -> set[str]:
    """Return the names of the layers whose outputs for one sample reach the losses of other samples.

    Two backward passes decide. The first starts from random cotangents (derivatives with respect to ``results``), the
    second from the same cotangents multiplied by a number w_n for each sample n. If an output for sample n reaches only
    the loss of sample n, its derivative in the second pass is w_n times that in the first.

    Args:
        record: the record of the forward, before its edges are released.
        results: the tensors that the model returned and that require gradients.
        layers: the captured layers, by name.
    """
    batched = [(name, call) for name, calls in record.calls.items() for call in calls if name not in record.unbatched]
    checked = [(name, call, call.edges[0]) for name, call in batched if call.edges[0]]
    results = [result for result in results if result.dim() and len(result) == record.samples]
    if not checked or not results:
        return set()
    generator = torch.Generator().manual_seed(0)
    multipliers_N = torch.rand(record.samples, generator=generator).to(results[0]) + 0.5
    cotangents = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    multiplied = [multipliers_N.view(-1, *(1 for _ in c.shape[1:])) * c for c in cotangents]
    size = torch.stack([c.norm() for c in cotangents]).norm()
    first, second = (_grad_norms(results, checked, layers, c) for c in (cotangents, multiplied))
    mixing = set()
    for (name, _, _), first_N, second_N in zip(checked, first, second, strict=True):
        if len(first_N) != record.samples:  # the output has no batch dimension, which `locate_samples` has reported
            continue
        # The tolerance is sqrt(eps) of the norm, plus eps^0.75 of the cotangents for derivatives that are nearly zero.
        eps, expected_N = torch.finfo(first_N.dtype).eps, first_N * multipliers_N.to(first_N.dtype)
        if (second_N - expected_N).norm() > eps**0.5 * expected_N.norm() + eps**0.75 * size.to(first_N.dtype):
            mixing.add(name)
    return mixing


def _grad_norms(
    results: Sequence[Tensor],
    checked: Sequence[CheckedCall],
    layers: Mapping[str, CapturedLayer],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return, for each call, the norms [N] of the derivatives with respect to its output for each sample."""
    edges = [edge for _, _, edge in checked]
    grads = torch.autograd.grad(results, edges, cotangents, retain_graph=True, allow_unused=True)
    norms = []
    for (name, call, _), g in zip(checked, grads, strict=True):
        dim = 1 if call.samples_second else samples_dim(layers[name].layer)
        samples_first = cotangents[0].new_zeros(1, 1) if g is None else g.transpose(0, dim).flatten(1)
        norms.append(samples_first.norm(dim=1))
    return norms


def leaves_reached(outputs: Sequence[Tensor]) -> Counter[int]:
    """Count how many edges of the graph of ``outputs`` end in each leaf tensor, by the leaf's id."""
    reached: Counter[int] = Counter()
    seen, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for successor, _ in node.next_functions:
            leaf = getattr(successor, "variable", None)
            if leaf is not None:
                reached[id(leaf)] += 1
            else:
                stack.append(successor)
    return reached
