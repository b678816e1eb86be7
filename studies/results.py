"""What the page says about the runs: curves over the seeds, their times, and the comparison with each rival."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from studies import stages, timing
from studies.optimizers import NAMES, OURS, RIVALS, defaults
from studies.problems import PROBLEMS
from studies.problems.base import Role
from studies.runs import SEEDS, Case, Run, Store, of
from tengrad_triton.optim.interval import interval_at

Missing = Literal["not measured", "not reached", "no end"]


def refreshes(steps: int) -> list[int]:
    """Return the steps before ``steps`` at which TENGraD refreshes with its defaults."""
    every = defaults()["refresh_every"]
    refreshed: list[int] = []
    for step in range(steps):
        if not refreshed or step - refreshed[-1] >= interval_at(every, step):
            refreshed.append(step)
    return refreshed


@dataclass(frozen=True)
class Curve:
    """An optimizer's runs at one learning rate that did not fail, and the seconds of a refresh and of a reuse step.

    Attributes:
        failures: how the others failed.
    """

    optimizer: str
    tuned: bool
    runs: tuple[Run, ...]
    seconds: dict[str, float]
    failures: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The label in legends."""
        return f"{self.optimizer}, lr {self.runs[0].lr:.2g}{' (tuned)' if self.tuned else ''}"

    def end(self, quantity: str = "loss") -> float:
        """Return the mean over the seeds of the last value of a quantity."""
        return statistics.mean(getattr(run, quantity)[-1] for run in self.runs)

    @cached_property
    def times(self) -> list[float]:
        """The seconds of training before each evaluation."""
        refreshed = refreshes(self.runs[0].steps[-1])
        extra = self.seconds["refresh"] - self.seconds["reuse"]  # 0 for the other optimizers
        return [n * self.seconds["reuse"] + extra * sum(s < n for s in refreshed) for n in self.runs[0].steps]

    @property
    def losses(self) -> list[float]:
        """The mean loss over the seeds at each evaluation."""
        return [statistics.mean(values) for values in zip(*(run.loss for run in self.runs), strict=True)]

    def loss_at(self, seconds: float) -> float | None:
        """Return the loss at a time, by linear interpolation.

        It is None before the first evaluation, and the last loss after the last evaluation.
        """
        points = list(zip(self.times, self.losses, strict=True))
        for (t0, l0), (t1, l1) in pairwise(points):
            if t0 <= seconds <= t1:
                return l0 + (l1 - l0) * (seconds - t0) / (t1 - t0)
        return points[-1][1] if seconds > points[-1][0] else None

    def seconds_to(self, loss: float) -> float | None:
        """Return the first time at which the loss was as low as ``loss``, by linear interpolation, or None."""
        return self._first(loss, self.times)

    def steps_to(self, loss: float) -> float | None:
        """Return the number of steps to that time, or None."""
        return self._first(loss, [float(step) for step in self.runs[0].steps])

    def _first(self, loss: float, at: list[float]) -> float | None:
        points = list(zip(at, self.losses, strict=True))
        if points[0][1] <= loss:
            return points[0][0]
        for (t0, l0), (t1, l1) in pairwise(points):
            if l1 <= loss:
                return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
        return None


def ratio(ours: Curve | None, rival: Curve | None) -> float | Missing:
    """Return TENGraD's time to the loss where a rival's runs end, over the rival's time to their end.

    A failed seed of TENGraD reaches nothing. Of a rival, the seeds that did not fail count; without one it has no end.
    """
    if ours is None or rival is None:
        return "not measured"
    if not rival.runs:
        return "no end"
    reached = None if ours.failures else ours.seconds_to(rival.losses[-1])
    return "not reached" if reached is None else reached / rival.times[-1]


@dataclass(frozen=True)
class Target:
    """What is asked of TENGraD: ``ratio`` at most ``goal`` on a share of the problems, and never above ``worst``."""

    rival: str
    goal: float
    share: tuple[int, int]
    worst: float | None = None


TARGETS = (Target("adamw", 0.75, (2, 3), 1.1), Target("muon", 1.0, (2, 3)), Target("soap", 1.0, (1, 2)))


@dataclass(frozen=True)
class Score:
    """How many of the problems met a target; ``behind`` are those above the worst ratio, or never reached."""

    target: Target
    met: int
    of: int
    behind: tuple[str, ...]

    @property
    def is_met(self) -> bool:
        """Whether the whole target is met; an empty set of problems meets none."""
        share, whole = self.target.share
        enough = self.met * whole >= share * self.of > 0
        return enough and (self.target.worst is None or not self.behind)


@dataclass(frozen=True)
class Results:
    """All valid results in the store."""

    store: Store

    @property
    def problems(self) -> list[str]:
        """The problems of which anything was trained."""
        return [name for name in PROBLEMS if any(self._runs(name, o, 1) for o in NAMES) or self.tuned(name)]

    def tuned(self, problem: str) -> dict[str, float]:
        """Return the best factor of each rival whose grid is finished."""
        found = {}
        for name in RIVALS:
            factors = stages.grid(problem, name, self.store)
            if all(self.store.run(Case(problem, name, factor, SEEDS[0])) for factor in factors):
                found[name] = stages.tuned(problem, name, self.store)
        return found

    @property
    def runs(self) -> list[Run]:
        """All valid runs."""
        files = sorted(self.store.folder.glob("*-seed*.json"))
        cases = [Case(**(self.store.read(file.name) or {})["case"]) for file in files]
        known = [case for case in cases if case.problem in PROBLEMS and case.optimizer in NAMES]
        return [run for run in map(self.store.run, known) if run is not None]

    def seconds(self, problem: str) -> dict[str, dict[str, float]]:
        """Return the seconds of a refresh and of a reuse step, for each optimizer whose settings are those of today."""
        kept: dict[str, Any] = self.store.read(f"{problem}-timing.json") or {}
        settings, today = kept.get("settings", {}), timing.settings(problem)
        return {name: times for name, times in kept.get("seconds", {}).items() if settings.get(name) == today.get(name)}

    @property
    def machine(self) -> dict[str, Any]:
        """The machine on which the first problem was timed, or nothing."""
        timed = (self.store.read(f"{name}-timing.json") for name in PROBLEMS if self.seconds(name))
        return next((kept["machine"] for kept in timed if kept), {})

    def curve(self, problem: str, optimizer: str, factor: float, is_tuned: bool = False) -> Curve | None:
        """Return the runs at one multiple of the default learning rate, or None if none was run and timed."""
        runs, seconds = self._runs(problem, optimizer, factor), self.seconds(problem).get(optimizer)
        if not runs or seconds is None:
            return None
        finished = tuple(run for run in runs if not run.failure)
        return Curve(optimizer, is_tuned, finished, seconds, tuple(run.failure for run in runs if run.failure))

    def ours(self, problem: str) -> Curve | None:
        """Return TENGraD with its defaults."""
        return self.curve(problem, OURS, 1)

    def rival(self, problem: str, name: str) -> Curve | None:
        """Return a rival with its best learning rate, or None as long as its grid is not finished."""
        best = self.tuned(problem).get(name)
        return None if best is None else self.curve(problem, name, best, is_tuned=best != 1)

    def curves(self, problem: str) -> list[Curve]:
        """Return TENGraD, AdamW with its default learning rate, and each rival with its best one."""
        found = [self.ours(problem), self.curve(problem, "adamw", 1), *(self.rival(problem, name) for name in RIVALS)]
        rates = {(curve.optimizer, curve.tuned): curve for curve in found if curve is not None}
        return list(rates.values())

    def score(self, target: Target, role: Role) -> Score:
        """Return how the problems of one half, as far as measured, stand against a target."""
        names = [name for name in self.problems if PROBLEMS[name].role == role]
        ratios = {name: ratio(self.ours(name), self.rival(name, target.rival)) for name in names}
        reached = {name: value for name, value in ratios.items() if isinstance(value, float)}
        lost = [name for name, value in ratios.items() if value == "not reached"]
        slow = [name for name, value in reached.items() if value > (target.worst or target.goal)]
        met = sum(value <= target.goal for value in reached.values())
        return Score(target, met, len(reached) + len(lost), tuple(slow + lost))

    def ends(self, problem: str, optimizer: str, factor: float) -> list[float]:
        """Return the last loss of each seed that did not fail."""
        return [run.loss[-1] for run in self._runs(problem, optimizer, factor) if not run.failure]

    def failed(self, problem: str, optimizer: str, factor: float) -> int:
        """Return the number of seeds that failed."""
        return sum(bool(run.failure) for run in self._runs(problem, optimizer, factor))

    def ablation(self, problem: str, change: str) -> Run | None:
        """Return the run with one of the defaults changed, or with all defaults if ``change`` is empty."""
        return self.store.run(Case(problem, OURS, 1, SEEDS[0], change))

    def _runs(self, problem: str, optimizer: str, factor: float) -> Sequence[Run]:
        return of(self.store, problem, optimizer, factor)
