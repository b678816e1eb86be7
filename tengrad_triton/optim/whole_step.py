"""A closure that takes the whole step, for code that computes a step in another way: the compiled step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class WholeStep(Generic[T]):
    """Pass it to `CurvatureOptimizer.step`, which then does nothing but to call it.

    So everything that surrounds the step stays as it is: step hooks, and what a learning rate scheduler or another
    wrapper has put around the method ``step``.

    Attributes:
        take: takes the step, and returns the loss.
    """

    take: Callable[[], T]

    def __call__(self) -> T:
        """Take the step."""
        return self.take()
