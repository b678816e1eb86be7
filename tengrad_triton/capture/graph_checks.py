"""Where the graph behind a forward's output comes from: whose samples, and by how many ways to which parameters.

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


def mixing_layers(record: Record, results: Sequence[Tensor], sources: Mapping[str, CapturedLayer]) -> set[str]:
    """Return the layers whose outputs' entries for one sample reach the losses of others.

    With a weight of its own for each sample, a derivative by what is sample n's only is the plain one times weight n.
    """
    fitting = [(name, use) for name, uses in record.calls.items() for use in uses if name not in record.unbatched]
    checked = [(name, use, use.edges[0]) for name, use in fitting if use.edges[0]]
    results = [result for result in results if result.dim() and len(result) == record.samples]
    if not checked or not results:
        return set()
    generator = torch.Generator().manual_seed(0)
    weights_N = torch.rand(record.samples, generator=generator).to(results[0]) + 0.5
    cotangents = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    weighted = [weights_N.view(-1, *(1 for _ in c.shape[1:])) * c for c in cotangents]
    size = torch.stack([c.norm() for c in cotangents]).norm()
    plain, own = (_norms(results, checked, sources, c) for c in (cotangents, weighted))
    mixing = set()
    for (name, _, _), norm_N, own_N in zip(checked, plain, own, strict=True):
        if len(norm_N) != record.samples:  # no batch at all, which nobody takes for one
            continue
        # To half the digits; what is next to nothing beside the cotangents is rounding.
        eps, expected_N = torch.finfo(norm_N.dtype).eps, norm_N * weights_N.to(norm_N.dtype)
        if (own_N - expected_N).norm() > eps**0.5 * expected_N.norm() + eps**0.75 * size.to(norm_N.dtype):
            mixing.add(name)
    return mixing


def _norms(
    results: Sequence[Tensor],
    calls: Sequence[tuple[str, LayerCall, GradientEdge]],
    sources: Mapping[str, CapturedLayer],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return the norm of the derivative by each call's output, by sample: all that is kept of one pass for the next."""
    edges = [edge for _, _, edge in calls]
    grads = torch.autograd.grad(results, edges, cotangents, retain_graph=True, allow_unused=True)
    norms = []
    for (name, use, _), g in zip(calls, grads, strict=True):
        dim = 1 if use.samples_second else samples_dim(sources[name].layer)
        samples_first = cotangents[0].new_zeros(1, 1) if g is None else g.transpose(0, dim).flatten(1)
        norms.append(samples_first.norm(dim=1))
    return norms


def leaves_reached(outputs: Sequence[Tensor]) -> Counter[int]:
    """Count how many edges of the graph behind ``outputs`` end in each leaf, by the leaf's id."""
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
