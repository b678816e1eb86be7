"""The stats of an optimizer as flat numbers, which every log takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Real
from typing import Any

PREFIX = "tengrad"
"""What the names of all numbers begin with."""


def numbers_of(optimizer: Any, *, each: bool = False) -> dict[str, float]:
    """Return the numbers in ``optimizer.stats`` by names such as ``"tengrad/rows"``, for a log.

    Reading them waits for the device. Entries without a number are left out.

    Args:
        optimizer: `TENGraD` or another optimizer with ``stats``; or what Accelerate or Lightning have wrapped it in.
        each: whether a mapping, such as the damping of every block, gives a number for each of its keys; otherwise it
            gives its least and its largest one, as ``"tengrad/damping/min"`` and ``"tengrad/damping/max"``.

    Raises:
        TypeError: the optimizer has no stats.
    """
    return dict(_numbers(PREFIX, stats_of(optimizer), each))


def has_stats(optimizer: Any) -> bool:
    """Whether an optimizer, or what it wraps, has ``stats`` that are a dataclass."""
    return dataclasses.is_dataclass(getattr(_unwrapped(optimizer), "stats", None))


def stats_of(optimizer: Any) -> Any:
    """Return the ``stats`` of an optimizer, or of what it wraps.

    Raises:
        TypeError: it has none.
    """
    if not has_stats(optimizer):
        name = type(_unwrapped(optimizer)).__name__
        raise TypeError(f"expected an optimizer with stats, such as TENGraD, got {name}")
    return _unwrapped(optimizer).stats


def _unwrapped(optimizer: Any) -> Any:
    while not hasattr(optimizer, "stats") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _numbers(name: str, value: Any, each: bool) -> list[tuple[str, float]]:
    if dataclasses.is_dataclass(value):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return [pair for key, entry in fields for pair in _numbers(f"{name}/{key}", entry, each)]
    if isinstance(value, Mapping):
        found = [pair for key, entry in value.items() for pair in _numbers(f"{name}/{key}", entry, each)]
        if each or not found:
            return found
        numbers = [number for _, number in found]
        return [(f"{name}/min", min(numbers)), (f"{name}/max", max(numbers))]
    return [(name, float(value))] if isinstance(value, Real) else []
