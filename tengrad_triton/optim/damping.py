"""Damping that changes: by a schedule, or by Levenberg and Marquardt's rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Callable[[int], float]
"""A function from the number of steps taken to the damping."""


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that adapts itself at every refresh (Martens 2010, section 4.1; docs/math.md, M8).

    ρ = ΔL / ΔM compares how a step changed the loss with the change that the quadratic model predicted. Where ρ > 3/4
    the setting ``damping`` is multiplied by ``decrease``; where ρ < 1/4, or is no number, by ``increase``. The new
    damping holds from the next refresh on.

    Args:
        start: the first damping, positive.
        decrease: the factor after a well predicted step, in (0, 1].
        increase: the factor after a badly predicted step, at least 1.
        least: the smallest damping.
        most: the largest damping.

    Raises:
        ValueError: a setting is out of range.
    """

    start: float = 0.1
    decrease: float = 2 / 3
    increase: float = 3 / 2
    least: float = 1e-8
    most: float = 1e4

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.start <= self.most < math.inf:
            raise ValueError(f"expected 0 < least <= start <= most, got {self.least}, {self.start}, {self.most}")
        if not 0 < self.decrease <= 1 <= self.increase < math.inf:
            raise ValueError(f"expected 0 < decrease <= 1 <= increase, got {self.decrease} and {self.increase}")

    def adapted(self, damping: float, actual: float, predicted: float) -> float:
        """Return the damping after a step that changed the loss by ``actual`` where ``predicted`` was expected."""
        ratio = actual / predicted if predicted else math.nan
        if ratio > 0.75 and predicted < 0:
            return max(self.least, self.decrease * damping)
        if ratio >= 0.25 and predicted < 0:
            return damping
        return min(self.most, self.increase * damping)


Damping = float | Schedule | Literal["lm"] | LevenbergMarquardt


def rule_of(damping: Any) -> tuple[Schedule | LevenbergMarquardt | None, Any]:
    """Return the rule by which a group's damping changes, or None, and the value that the group starts with.

    A schedule is that value itself until it is evaluated at the present step.
    """
    rule = LevenbergMarquardt() if isinstance(damping, str) and damping == "lm" else damping
    if isinstance(rule, LevenbergMarquardt):
        return rule, rule.start
    return (rule, rule) if callable(rule) else (None, damping)
