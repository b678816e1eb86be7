"""Refresh intervals: how many steps a refresh of the curvature serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growing:
    """An interval of a third of the steps taken so far, at least 1 and at most ``most``.

    The curvature changes fastest at the start of training. For ``most=10`` the steps 0 to 38 take 14 refreshes, and
    every tenth step from there on takes one. docs/defaults.md shows what that gains.

    Args:
        most: the longest interval, in steps.

    Raises:
        ValueError: ``most`` is less than 1.
    """

    most: int = 10

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1 step, got {self.most}")

    def __call__(self, step: int) -> int:
        """Return how many steps a refresh at ``step`` serves."""
        return max(1, min(self.most, step // 3))
