"""Several optimizers on one problem, each for the same wall-clock time, in turns: what else runs delays all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.progress import Progress


class Point(NamedTuple):
    """What was measured, after that many steps and seconds of stepping."""

    step: int
    seconds: float
    value: float


@dataclass
class Runner:
    """One optimizer on its own copy of the problem.

    Attributes:
        name: of the optimizer.
        setting: what was tried with it, in words.
        step: takes one step; is told the share of its time that is spent, for a schedule.
        measure: returns what is compared, of which less is better.
        curve: what was measured so far.
        seconds: spent in steps.
        steps: taken.
    """

    name: str
    setting: str
    step: Callable[[float], object]
    measure: Callable[[], float]
    curve: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    @property
    def best(self) -> float:
        """Return the least value measured; infinite where none was finite."""
        return min((p.value for p in self.curve if p.value == p.value), default=float("inf"))

    def reached(self, value: float) -> Point | None:
        """Return the first point that is at least as good, if there is one."""
        return next((point for point in self.curve if point.value <= value), None)

    def look(self) -> None:
        """Measure; this is not on the clock."""
        self.curve.append(Point(self.steps, self.seconds, self.measure()))

    def advance(self, seconds: float) -> None:
        """Take one step on the clock."""
        start = time.perf_counter()
        self.step(min(1.0, self.seconds / seconds))
        self.seconds += time.perf_counter() - start
        self.steps += 1


def race(runners: Sequence[Runner], seconds: float, looks: int, progress: Progress) -> None:
    """Give each runner ``seconds`` of stepping and look at it ``looks`` times; who has had least is next."""
    task = progress.add_task("", total=seconds * len(runners))
    for runner in runners:
        runner.look()
    while (runner := min(runners, key=lambda r: r.seconds)).seconds < seconds:
        runner.advance(seconds)
        if runner.seconds >= len(runner.curve) * seconds / looks:
            runner.look()
            told = f"{runner.name}, {runner.setting}: {runner.curve[-1].value:.3g}"
            progress.update(task, completed=sum(r.seconds for r in runners), description=f"{told:60}")
    for runner in runners:
        if runner.curve[-1].step < runner.steps:
            runner.look()


def best_of(runners: Sequence[Runner]) -> list[Runner]:
    """Return of each optimizer the setting that came to the least value, in the order of their names' first mention."""
    names = dict.fromkeys(runner.name for runner in runners)
    return [min((r for r in runners if r.name == name), key=lambda r: r.best) for name in names]
