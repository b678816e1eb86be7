"""Checks on the graph behind a forward's output: which layers mix samples, and which leaves the graph reaches.

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
"""The name of a layer, one of its calls, and where the output of that call is in the graph."""


def mixing_layers(record: Record, results: Sequence[Tensor], layers: Mapping[str, CapturedLayer]) -> set[str]:
    """Return the names of the layers whose outputs for one sample reach the losses of other samples.

    Two backward passes decide: one from random cotangents, one from the same cotangents times a weight w_n for each
    sample. Where an output for sample n reaches the loss of sample n only, its derivative in the second pass is w_n
    times that in the first.

    Args:
        record: the forward, before its edges are released.
        results: the tensors that the model returned and that require gradients.
        layers: the captured layers, by name.
    """
    batched = [(name, call) for name, calls in record.calls.items() for call in calls if name not in record.unbatched]
    checked = [(name, call, call.edges[0]) for name, call in batched if call.edges[0]]
    results = [result for result in results if result.dim() and len(result) == record.samples]
    if not checked or not results:
        return set()
    generator = torch.Generator().manual_seed(0)
    weights_N = torch.rand(record.samples, generator=generator).to(results[0]) + 0.5
    cotangents = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    weighted = [weights_N.view(-1, *(1 for _ in c.shape[1:])) * c for c in cotangents]
    size = torch.stack([c.norm() for c in cotangents]).norm()
    plain, own = (_grad_norms(results, checked, layers, c) for c in (cotangents, weighted))
    mixing = set()
    for (name, _, _), norm_N, own_N in zip(checked, plain, own, strict=True):
        if len(norm_N) != record.samples:  # an output without a batch is not mistaken for one with a batch
            continue
        # Equal to half the digits; differences that are tiny beside the cotangents are rounding.
        eps, expected_N = torch.finfo(norm_N.dtype).eps, norm_N * weights_N.to(norm_N.dtype)
        if (own_N - expected_N).norm() > eps**0.5 * expected_N.norm() + eps**0.75 * size.to(norm_N.dtype):
            mixing.add(name)
    return mixing


def _grad_norms(
    results: Sequence[Tensor],
    checked: Sequence[CheckedCall],
    layers: Mapping[str, CapturedLayer],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return, for each call, the norm [N] over each sample of the derivative with respect to its output."""
    edges = [edge for _, _, edge in checked]
    grads = torch.autograd.grad(results, edges, cotangents, retain_graph=True, allow_unused=True)
    norms = []
    for (name, call, _), g in zip(checked, grads, strict=True):
        dim = 1 if call.samples_second else samples_dim(layers[name].layer)
        samples_first = cotangents[0].new_zeros(1, 1) if g is None else g.transpose(0, dim).flatten(1)
        norms.append(samples_first.norm(dim=1))
    return norms


def leaves_reached(outputs: Sequence[Tensor]) -> Counter[int]:
    """Count how many edges of the graph behind ``outputs`` end in each leaf tensor, by the leaf's id."""
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
