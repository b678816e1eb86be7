"""Refresh intervals: after how many steps the curvature is refreshed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.optim.validation import check_interval


@dataclass(frozen=True)
class Growing:
    """An interval of a third of the steps taken so far, at least 1 and at most ``most`` steps.

    The curvature changes fastest at the start of training. The optimizer asks for the interval at every step, and
    refreshes once the curvature has served for at least that many. By default it refreshes at the steps 0 to 5, 7, 10,
    14, 20, 29, 43 and 63, and from there on at every twentieth. docs/defaults.md shows what that gains.

    Args:
        most: the longest interval, in steps.

    Raises:
        ValueError: ``most`` is less than 1.
        TypeError: ``most`` is no whole number.
    """

    most: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.most, int) or isinstance(self.most, bool):
            raise TypeError(f"most must be a whole number of steps, got {self.most!r}")
        if self.most < 1:
            raise ValueError(f"most must be at least 1 step, got {self.most}")

    def __call__(self, step: int) -> int:
        """Return the interval at a step.

        Args:
            step: the number of steps taken so far.

        Returns:
            a number of steps, from 1 to ``most``.
        """
        return max(1, min(self.most, step // 3))

    def refreshes(self, steps: int) -> list[int]:
        """Return the steps at which the optimizer refreshes, if nothing else makes it refresh.

        Args:
            steps: the number of steps of the run; the first one is step 0.
        """
        refreshed: list[int] = []
        for step in range(steps):
            if not refreshed or step - refreshed[-1] >= self(step):
                refreshed.append(step)
        return refreshed


def interval_at(refresh_every: int | Callable[[int], int], step: int) -> int:
    """Return ``refresh_every``, evaluated at a step if it is a function."""
    if not callable(refresh_every):
        return refresh_every
    every = refresh_every(step)
    check_interval(every)
    return every


def paid_interval(every: int | Callable[[int], int], spending: Spending | None) -> int | Callable[[int], int]:
    """Return ``refresh_every``; a `Growing` that grows to what the budget asks for (M18)."""
    if isinstance(every, Growing) and spending is not None and spending.interval > every.most:
        return Growing(spending.interval)
    return every
