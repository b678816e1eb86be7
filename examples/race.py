"""Several optimizers on one problem, for the same wall-clock time each, in turns, so that load delays all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.progress import Progress


class Point(NamedTuple):
    """A measured value, and the steps and the seconds of stepping before it."""

    step: int
    seconds: float
    value: float


@dataclass
class Runner:
    """One optimizer on its own copy of the problem.

    Attributes:
        name: the name of the optimizer.
        setting: its setting, in words.
        step: takes one step; its argument is the share of the time that is used up, for a schedule.
        measure: returns the value to compare; lower is better.
        curve: the measurements so far.
        seconds: the time of all steps so far.
        steps: the number of steps so far.
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
        """The lowest measured value; infinite if none is finite."""
        return min((p.value for p in self.curve if p.value == p.value), default=float("inf"))

    def reached(self, value: float) -> Point | None:
        """Return the first point whose value is at most ``value``, if there is one."""
        return next((point for point in self.curve if point.value <= value), None)

    def record(self) -> None:
        """Measure and append a point; its time does not count."""
        self.curve.append(Point(self.steps, self.seconds, self.measure()))

    def advance(self, seconds: float) -> None:
        """Take one step, whose time counts; ``seconds`` is the time of all."""
        start = time.perf_counter()
        self.step(min(1.0, self.seconds / seconds))
        self.seconds += time.perf_counter() - start
        self.steps += 1


def race(runners: Sequence[Runner], seconds: float, points: int, progress: Progress) -> None:
    """Let each runner step for ``seconds`` and measure it ``points`` times. The runner with the least time is next."""
    task = progress.add_task("", total=seconds * len(runners))
    for runner in runners:
        runner.record()
    while (runner := min(runners, key=lambda r: r.seconds)).seconds < seconds:
        runner.advance(seconds)
        if runner.seconds >= len(runner.curve) * seconds / points:
            runner.record()
            line = f"{runner.name}, {runner.setting}: {runner.curve[-1].value:.3g}"
            progress.update(task, completed=sum(r.seconds for r in runners), description=f"{line:60}")
    for runner in runners:
        if runner.curve[-1].step < runner.steps:
            runner.record()


def best_of(runners: Sequence[Runner]) -> list[Runner]:
    """Return the best setting of each optimizer, in the order of the optimizers."""
    names = dict.fromkeys(runner.name for runner in runners)
    return [min((r for r in runners if r.name == name), key=lambda r: r.best) for name in names]
