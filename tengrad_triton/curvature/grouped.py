"""Products with the J of many parameters at once: one kernel launch for each group of Jacobians that can share it.

Dimensions: L Fisher blocks, N rows of J.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import Product
from tengrad_triton.curvature.jacobian import Jacobian, Jacobians, PerSample
from tengrad_triton.curvature.products import Grouped
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels.cpu import worth_a_batch


class BlockEntry(NamedTuple):
    """One parameter of a Fisher block: its J, the index of its block, and the target of its update."""

    jacobian: Jacobian
    block: int
    target: Target


def grams(jacobians: Sequence[Jacobian], blocks: Sequence[int], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix of every block: the sum of its parameters', which lie side by side in J."""
    k_LNN: Tensor | None = None
    for group in _groups("gram", jacobians):
        own, of_block = [jacobians[t] for t in group], [blocks[t] for t in group]
        first = own[0]
        if isinstance(first, Grouped):
            part = first.gram_grouped(own, of_block, count)
        else:
            part = _placed(first.gram(), of_block[0], count)
        k_LNN = part if k_LNN is None else k_LNN + part
    assert k_LNN is not None
    return k_LNN


def projections(entries: Sequence[BlockEntry], count: int, rows: int) -> Tensor:
    """Return y_LN = J V, summed over the parameters of every block; zeros follow where a block has fewer rows."""
    y_LN: Tensor | None = None
    for group in _groups("project", [one.jacobian for one in entries]):
        own, first = [entries[t] for t in group], entries[group[0]]
        if isinstance(first.jacobian, Grouped):
            grads, blocks = [one.target.grad for one in own], [one.block for one in own]
            part = first.jacobian.project_grouped([one.jacobian for one in own], grads, blocks, [count, rows])
        else:
            y_N = first.jacobian.project(first.target.grad)
            part = _placed(torch.nn.functional.pad(y_N, (0, rows - len(y_N))), first.block, count)
        y_LN = part if y_LN is None else y_LN + part
    assert y_LN is not None
    return y_LN


def expand_updates_(entries: Sequence[BlockEntry], w: Sequence[Tensor], dampings: Sequence[Tensor]) -> None:
    """Step every target along (grad − Jᵀ w) / damping; ``w`` and ``dampings`` have an entry for every block."""
    for group in _groups("expand", [one.jacobian for one in entries], [one.target.nesterov for one in entries]):
        own, first = [entries[t] for t in group], entries[group[0]]
        of_rows, damping = [w[one.block] for one in own], [dampings[one.block] for one in own]
        if isinstance(first.jacobian, Grouped):
            targets = [one.target for one in own]
            first.jacobian.expand_update_grouped_([one.jacobian for one in own], targets, of_rows, damping)
        else:
            first.jacobian.expand_update_(first.target, of_rows[0], damping[0])


def store_contiguously(jacobians: Jacobians) -> Jacobians:
    """Return the same J, with small explicit rows of one size stored as parts of one tensor.

    A CPU multiplies them in one batched call then.
    """
    by_size: dict[Hashable, list[Tensor]] = {}
    for one in (one for layer in jacobians.values() for one in layer.values()):
        if isinstance(one, PerSample):
            by_size.setdefault((one.j_NK.shape, one.j_NK.dtype), []).append(one.j_NK)
    moved: dict[int, Tensor] = {}
    for alike in filter(worth_a_batch, by_size.values()):
        moved |= zip(map(id, alike), torch.stack(alike).unbind(), strict=True)
    if not moved:
        return jacobians

    def placed(one: Jacobian) -> Jacobian:
        return replace(one, j_NK=moved.get(id(one.j_NK), one.j_NK)) if isinstance(one, PerSample) else one

    return {name: {label: placed(one) for label, one in layer.items()} for name, layer in jacobians.items()}


def _placed(one: Tensor, block: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[block] = one
    return whole


def _groups(
    product: Product, jacobians: Sequence[Jacobian], also_equal: Sequence[Hashable] | None = None
) -> Iterator[list[int]]:
    """Yield the indices of Jacobians that share a launch: equal keys, and equal entries of ``also_equal``."""
    groups: dict[Hashable, list[int]] = {}
    for index, one in enumerate(jacobians):
        if isinstance(one, Grouped):
            key: Hashable = (one.group_key(product), also_equal[index] if also_equal else None)
        else:
            key = index
        groups.setdefault(key, []).append(index)
    yield from groups.values()
