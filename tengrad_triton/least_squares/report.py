"""What `GaussNewton` reports: the numbers of its last step, and what its rows are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """Numbers of a `GaussNewton`'s last step.

    Attributes:
        step: the number of steps before it.
        loss: before the step, at its points.
        loss_after: after it, at the same points; the same number if the step was taken back.
        accepted: whether a step was taken.
        attempts: how many were tried, each with more damping than the one before.
        damping: α of the last attempt.
        length: the step length η that was taken; 0 if none was.
        ratio: the decrease of the loss over what the linear model predicted; 0 if no step was taken.
        rows: the rows of J̃.
    """

    step: int
    loss: float
    loss_after: float
    accepted: bool
    attempts: int
    damping: float
    length: float
    ratio: float
    rows: int
