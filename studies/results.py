"""The results of the runs, for the page and the figures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise

from studies.optimizers import BUILDERS
from studies.problems import PROBLEMS
from studies.runs import SEEDS, Case, Run, Store, of, takes_part, tuned
from tengrad_triton import Growing


@dataclass(frozen=True)
class Curve:
    """An optimizer's runs at one learning rate, one for each seed, and the seconds of a refresh and of a reuse step."""

    optimizer: str
    tuned: bool
    runs: tuple[Run, ...]
    seconds: dict[str, float]

    @property
    def label(self) -> str:
        """The label in legends."""
        return f"{self.optimizer}, lr {self.runs[0].lr:.2g}{' (tuned)' if self.tuned else ''}"

    def end(self, quantity: str = "loss") -> float:
        """Return the mean over the seeds of the last value of a quantity."""
        return statistics.mean(getattr(run, quantity)[-1] for run in self.runs)

    @property
    def times(self) -> list[float]:
        """The seconds of training before each evaluation."""
        refreshes = Growing().refreshes(self.runs[0].steps[-1])
        extra = self.seconds["refresh"] - self.seconds["reuse"]  # 0 for the other optimizers
        return [n * self.seconds["reuse"] + extra * sum(s < n for s in refreshes) for n in self.runs[0].steps]

    @property
    def losses(self) -> list[float]:
        """The mean loss over the seeds at each evaluation."""
        return [statistics.mean(values) for values in zip(*(run.loss for run in self.runs), strict=False)]

    def loss_at(self, seconds: float) -> float | None:
        """Return the loss at a time, by linear interpolation.

        It is None before the first evaluation, and the last loss after the last evaluation.
        """
        points = list(zip(self.times, self.losses, strict=False))
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
        points = list(zip(at, self.losses, strict=False))
        if points[0][1] <= loss:
            return points[0][0]
        for (t0, l0), (t1, l1) in pairwise(points):
            if l1 <= loss:
                return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
        return None


@dataclass(frozen=True)
class Results:
    """All results in the store."""

    store: Store

    @property
    def problems(self) -> list[str]:
        """The problems that were timed and trained."""
        return [name for name in PROBLEMS if self.seconds(name) and self.curves(name)]

    @property
    def commits(self) -> list[str]:
        """The commits of the runs."""
        files = self.store.folder.glob("*-seed*.json")
        return sorted({(self.store.read(file.name) or {})["commit"] for file in files})

    def seconds(self, problem: str) -> dict[str, dict[str, float]]:
        """Return the seconds of a refresh and of a reuse step, for each optimizer."""
        return (self.store.read(f"{problem}-timing.json") or {}).get("seconds", {})

    def quality(self, problem: str) -> str:
        """Return the name of the quality."""
        return "error" if problem == "pinn" else "accuracy"

    def optimizers(self, problem: str) -> list[str]:
        """Return the optimizers that take part."""
        return [name for name in BUILDERS if takes_part(problem, name)]

    def curve(self, problem: str, optimizer: str, factor: float, is_tuned: bool = False) -> Curve | None:
        """Return the runs at one multiple of the default learning rate, or None if there is none."""
        runs = tuple(run for run in of(self.store, problem, optimizer, factor) if run.steps)
        seconds = self.seconds(problem)[optimizer]
        return Curve(optimizer, is_tuned, runs, seconds) if runs else None

    def curves(self, problem: str) -> list[Curve]:
        """Return the curve of each optimizer at its default learning rate, and at its tuned one if that differs."""
        found = []
        for name in self.optimizers(problem):
            best = tuned(problem, name, self.store)
            found.append(self.curve(problem, name, 1))
            if best != 1:
                found.append(self.curve(problem, name, best, is_tuned=True))
        return [curve for curve in found if curve is not None]

    def ends(self, problem: str, optimizer: str, factor: float) -> list[float]:
        """Return the last loss of each seed that did not diverge."""
        return [run.loss[-1] for run in of(self.store, problem, optimizer, factor) if run.loss and not run.diverged]

    def diverged(self, problem: str, optimizer: str, factor: float) -> int:
        """Return the number of seeds that diverged."""
        return sum(run.diverged for run in of(self.store, problem, optimizer, factor))

    def ablation(self, problem: str, change: str) -> Run | None:
        """Return the run with one of the defaults changed, or with all defaults if ``change`` is empty."""
        return self.store.run(Case(problem, "tengrad", 1, SEEDS[0], change))
