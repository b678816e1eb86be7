"""Products with the J of many parameters at once: one launch for those that say that they belong together.

Dimensions: L systems, N rows of J.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.jacobian import Jacobian, Jacobians, PerSample
from tengrad_triton.kernels.cpu import worth_a_batch
from tengrad_triton.products import Product, Team
from tengrad_triton.update import Target


class Work(NamedTuple):
    """One parameter's J, the system that it is part of, and the target that it updates."""

    rows: Jacobian
    system: int
    target: Target


def grams(members: Sequence[tuple[Jacobian, int]], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix of every system: its parameters lie side by side in J, so theirs add up."""
    k_LNN: Tensor | None = None
    for alike in _together("gram", [rows for rows, _ in members]):
        jacobians, systems = [members[t][0] for t in alike], [members[t][1] for t in alike]
        first = jacobians[0]
        if isinstance(first, Team):
            part = first.gram_all(jacobians, systems, count)
        else:
            part = _placed(first.gram(), systems[0], count)
        k_LNN = part if k_LNN is None else k_LNN + part
    assert k_LNN is not None
    return k_LNN


def projections(work: Sequence[Work], count: int, rows: int) -> Tensor:
    """Return y_LN = J V of every system, whose parameters' add up; zero where a system has fewer rows."""
    y_LN: Tensor | None = None
    for alike in _together("project", [one.rows for one in work]):
        members, first = [work[t] for t in alike], work[alike[0]]
        if isinstance(first.rows, Team):
            grads, systems = [one.target.grad for one in members], [one.system for one in members]
            part = first.rows.project_all([one.rows for one in members], grads, systems, [count, rows])
        else:
            y_N = first.rows.project(first.target.grad)
            part = _placed(torch.nn.functional.pad(y_N, (0, rows - len(y_N))), first.system, count)
        y_LN = part if y_LN is None else y_LN + part
    assert y_LN is not None
    return y_LN


def expand_updates_(work: Sequence[Work], w: Sequence[Tensor], divisors: Sequence[Tensor]) -> None:
    """Step every target along (grad − Jᵀ w) / divisor; ``w`` and ``divisors`` are by system."""
    for alike in _together("expand", [one.rows for one in work], [one.target.nesterov for one in work]):
        members, first = [work[t] for t in alike], work[alike[0]]
        targets = [one.target for one in members]
        w_N, divisor = [w[one.system] for one in members], [divisors[one.system] for one in members]
        if isinstance(first.rows, Team):
            first.rows.expand_update_all_([one.rows for one in members], targets, w_N, divisor)
        else:
            first.rows.expand_update_(first.target, w_N[0], divisor[0])


def side_by_side(blocks: Jacobians) -> Jacobians:
    """Return the same rows, those that a CPU had better multiply in one call as parts of one tensor."""
    sizes: dict[Hashable, list[Tensor]] = {}
    for rows in (rows for block in blocks.values() for rows in block.values()):
        if isinstance(rows, PerSample):
            sizes.setdefault((rows.j_NK.shape, rows.j_NK.dtype), []).append(rows.j_NK)
    moved: dict[int, Tensor] = {}
    for alike in filter(worth_a_batch, sizes.values()):
        moved |= zip(map(id, alike), torch.stack(alike).unbind(), strict=True)
    if not moved:
        return blocks

    def placed(rows: Jacobian) -> Jacobian:
        return replace(rows, j_NK=moved.get(id(rows.j_NK), rows.j_NK)) if isinstance(rows, PerSample) else rows

    return {name: {label: placed(rows) for label, rows in block.items()} for name, block in blocks.items()}


def _placed(one: Tensor, system: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[system] = one
    return whole


def _together(
    product: Product, jacobians: Sequence[Jacobian], also: Sequence[Hashable] | None = None
) -> Iterator[list[int]]:
    """Yield which ones go together: a team with what else has to agree, or one alone."""
    teams: dict[Hashable, list[int]] = {}
    for index, rows in enumerate(jacobians):
        key = (rows.team(product), also[index] if also else None) if isinstance(rows, Team) else index
        teams.setdefault(key, []).append(index)
    yield from teams.values()
