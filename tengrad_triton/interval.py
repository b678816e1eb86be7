"""How many steps a refresh of the curvature serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growing:
    """A third of the steps taken so far, and at most ``most``: the curvature changes fastest while training begins.

    An untrained network's curvature can grow a hundredfold within ten steps, and a step along the old one diverges
    (docs/defaults.md). For ``most=10`` the first 38 steps take 14 refreshes; from then on it is every tenth.
    """

    most: int = 10

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1 step, got {self.most}")

    def __call__(self, step: int) -> int:
        """Return how many steps a refresh at ``step`` serves."""
        return max(1, min(self.most, step // 3))
