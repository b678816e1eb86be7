"""What an entrant of the study is: an optimizer that was built for a problem and its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from studies.pinn.problems.base import Problem


def _nothing() -> None:
    pass


def _ignore(share: float) -> None:
    del share


@dataclass
class Entrant:
    """An optimizer at work.

    Attributes:
        name: the optimizer, such as ``"adam"``.
        setting: its settings in words, for the page.
        step: takes one step, given the points of each term; the clock counts this alone.
        fixed_points: whether it needs the same points at every step, also where the problem draws new ones.
        schedule: is called before each step, and after each pause, with the share of the time that is used up, from 0
            to 1.
        loops: whether the optimizer has a loop of its own, so that a step is a whole run.
        pause: set by the clock. An optimizer that loops calls it whenever the model has new weights: there the error
            may be measured, and the clock raises `TimeIsUp` through the optimizer.
    """

    name: str
    setting: str
    step: Callable[[Mapping[str, Any]], object]
    fixed_points: bool = False
    schedule: Callable[[float], object] = _ignore
    loops: bool = False
    pause: Callable[[], None] = _nothing


class TimeIsUp(Exception):  # noqa: N818 - the end of a run is no error
    """The time of a run is used up."""


Build = Callable[[Problem, nn.Module], Entrant]
"""Builds an entrant for a problem and its model, whose first weights are there already."""
Family = Mapping[str, Build]
"""An optimizer's settings that are tried, by a short name without spaces; with one there is nothing to tune."""
