"""How many steps a refresh of the curvature serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growing:
    """A third of the steps take_rows so far, and at most ``most``: the curvature changes fastest while training begins.

    For ``most=10`` steps 0 to 38 take 14 refreshes, and from then on it is every tenth. What that gains stands in
    docs/defaults.md.
    """

    most: int = 10

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be at least 1 step, got {self.most}")

    def __call__(self, step: int) -> int:
        """Return how many steps a refresh at ``step`` serves."""
        return max(1, min(self.most, step // 3))
