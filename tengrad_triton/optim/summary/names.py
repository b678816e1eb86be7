"""Names of modules that differ in numbers only, as one: ``layers.{0-11}.query`` for twelve layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

ALIKE = 3
"""The fewest names that become one."""


class Folded(NamedTuple):
    """Names that differ in numbers only.

    Attributes:
        parts: of the names, between dots; the numbers of all of them where they differ.
        key: what they have in common beside their parts.
        places: where they stood in the list.
    """

    parts: tuple[str | tuple[int, ...], ...]
    key: Hashable
    places: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(part if isinstance(part, str) else f"{{{_ranges(part)}}}" for part in self.parts)


def fold(names: Sequence[str], keys: Sequence[Hashable]) -> list[Folded]:
    """Return the names, in the order of their first ones; those of one key that differ in numbers only are folded."""
    found = [
        Folded(tuple(name.split(".")), key, (place,)) for place, (name, key) in enumerate(zip(names, keys, strict=True))
    ]
    for at in range(max((len(one.parts) for one in found), default=0)):
        found = _fold_at(found, at)
    return found


def folded_names(names: Iterable[str]) -> str:
    """Return names as one text, folded."""
    listed = list(names)
    return ", ".join(map(str, fold(listed, [None] * len(listed))))


def _fold_at(folded: Sequence[Folded], at: int) -> list[Folded]:
    """Fold what differs in the part number ``at`` only."""
    groups: dict[Hashable, list[Folded]] = {}
    for one in folded:
        groups.setdefault(_without(one, at), []).append(one)
    found = []
    for one in folded:
        group = groups[_without(one, at)]
        if len(group) < ALIKE:
            found.append(one)
        elif one is group[0]:
            numbers = tuple(sorted(int(str(other.parts[at])) for other in group))
            parts = (*one.parts[:at], numbers, *one.parts[at + 1 :])
            found.append(Folded(parts, one.key, tuple(place for other in group for place in other.places)))
    return found


def _without(one: Folded, at: int) -> Hashable:
    """Return what all that may be folded at ``at`` have in common; without a number there, what no other has."""
    part = one.parts[at] if at < len(one.parts) else ""
    if not isinstance(part, str) or not part.isascii() or not part.isdigit() or str(int(part)) != part:
        return one.places
    return one.parts[:at], one.parts[at + 1 :], one.key


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges: ``0-4,6-11``, or ``0-198 by 2`` where each is 2 more than the one before."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
