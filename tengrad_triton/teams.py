"""Products with the J of many parameters at once: one launch for those that say that they belong together.

Dimensions: L systems, N rows of J.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from tengrad_triton.jacobian import Jacobian
from tengrad_triton.update import Target


class Team(Protocol):
    """A Jacobian that is served together with those of the same ``team``; any other is served by its own methods.

    The functions take an entry for each member; ``systems`` says which row of the result it adds to.
    """

    @property
    def team(self) -> Hashable:
        """Return what members have in common: those that say the same can share a launch."""

    @staticmethod
    def gram_all(members: Sequence[Any], systems: list[int], count: int) -> Tensor:
        """Return k_LNN, each system's sum of its members' `Jacobian.gram`."""

    @staticmethod
    def project_all(members: Sequence[Any], v: Sequence[Tensor], systems: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, each system's sum of its members' `Jacobian.project`."""

    @staticmethod
    def expand_update_all_(
        members: Sequence[Any], targets: Sequence[Target], w: Sequence[Tensor], divisors: Sequence[Tensor]
    ) -> None:
        """Do each member's `Jacobian.expand_update_`; the targets agree on ``nesterov``."""


class Work(NamedTuple):
    """One parameter's J, the system that it is part of, and the target that it updates."""

    rows: Jacobian
    system: int
    target: Target


def grams(members: Sequence[tuple[Jacobian, int]], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix of every system: its parameters lie side by side in J, so theirs add up."""
    k_LNN: Tensor | None = None
    for alike in _together([rows for rows, _ in members]):
        jacobians, systems = [members[t][0] for t in alike], [members[t][1] for t in alike]
        first = jacobians[0]
        if _in_team(first):
            part = first.gram_all(jacobians, systems, count)
        else:
            part = _placed(first.gram(), systems[0], count)
        k_LNN = part if k_LNN is None else k_LNN + part
    assert k_LNN is not None
    return k_LNN


def projections(work: Sequence[Work], count: int, rows: int) -> Tensor:
    """Return y_LN = J V of every system, whose parameters' add up; zero where a system has fewer rows."""
    y_LN: Tensor | None = None
    for alike in _together([one.rows for one in work]):
        members, first = [work[t] for t in alike], work[alike[0]]
        if _in_team(first.rows):
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
    for alike in _together([one.rows for one in work], [one.target.nesterov for one in work]):
        members, first = [work[t] for t in alike], work[alike[0]]
        targets = [one.target for one in members]
        w_N, divisor = [w[one.system] for one in members], [divisors[one.system] for one in members]
        if _in_team(first.rows):
            first.rows.expand_update_all_([one.rows for one in members], targets, w_N, divisor)
        else:
            first.rows.expand_update_(first.target, w_N[0], divisor[0])


def _in_team(rows: Any) -> TypeGuard[Team]:
    """Whether a Jacobian is a `Team`; `isinstance` with a protocol is always false where a graph is traced."""
    return hasattr(rows, "team")


def _placed(one: Tensor, system: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[system] = one
    return whole


def _together(jacobians: Sequence[Jacobian], also: Sequence[Hashable] | None = None) -> Iterator[list[int]]:
    """Yield which ones go together: a team with what else has to agree, or one alone."""
    teams: dict[Hashable, list[int]] = {}
    for index, rows in enumerate(jacobians):
        key = (rows.team, also[index] if also else None) if _in_team(rows) else index
        teams.setdefault(key, []).append(index)
    yield from teams.values()
