"""Seeds together: means with their spread, and the time to an accuracy, on the clock of training alone.

Key: E epochs, R runs (seeds).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

ORDER = ("tengrad", "tengrad_defaults", "sgd", "kfac", "ekfac", "kbfgs", "kbfgsl", "adamw", "muon", "soap", "shampoo")
Rows = Sequence[Mapping[str, Any]]  # what metrics.json has of a run: a number that is not finite is null
LEVELS = (50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94, 95)  # percent


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation where there are several."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value or more."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Finished:
    """A run as its outcome tells it."""

    optimizer: str
    seed: int
    rows: Rows
    diverged: bool
    tuned: Mapping[str, float]
    clock_of: str  # the column of the rows that is the clock

    def accuracies(self, part: str = "test") -> list[float]:
        """Return the accuracy after each epoch, in percent."""
        return [100 * row[f"{part}_accuracy"] for row in self.rows]

    def clock(self) -> list[float]:
        """Return the seconds of training until the end of each epoch, evaluations excluded."""
        return list(accumulate(row[self.clock_of] for row in self.rows))

    def top(self) -> tuple[float, float]:
        """Return the best test accuracy in percent, and the time to it."""
        accuracies = self.accuracies()
        best = max(accuracies)
        return best, self.clock()[accuracies.index(best)]

    def time_to(self, accuracy: float) -> float | None:
        """Return the time to the first epoch that ends with a test accuracy of at least so many percent."""
        reached = (t for t, a in zip(self.clock(), self.accuracies(), strict=True) if a >= accuracy)
        return next(reached, None)


def by_optimizer(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Return the runs of each optimizer."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups


def by_epoch(runs: Sequence[Finished], quantity: str, scale: float) -> tuple[list[Spread], list[float]]:
    """Return the spread of a column of the rows after each epoch that all runs have, and the mean time until then."""
    epochs = min(len(run.rows) for run in runs)
    values = [[run.rows[e][quantity] for run in runs] for e in range(epochs)]
    spreads = [Spread.of([math.nan if value is None else scale * value for value in at]) for at in values]
    clocks = [run.clock() for run in runs]
    return spreads, [statistics.mean(clock[e] for clock in clocks) for e in range(epochs)]


def times_to(runs: Sequence[Finished], accuracy: float) -> tuple[Spread | None, int]:
    """Return the spread of the times to an accuracy, over the runs that reach it, and how many do."""
    times = [time for run in runs if (time := run.time_to(accuracy)) is not None]
    return Spread.of(times) if times else None, len(times)


def levels(groups: Mapping[str, Sequence[Finished]]) -> list[int]:
    """Return the four highest of `LEVELS` that every run of some optimizer reaches."""
    sound = [[run for run in runs if not run.diverged] for runs in groups.values()]
    least = [min(run.top()[0] for run in runs) for runs in sound if runs]
    return [level for level in LEVELS if level <= max(least, default=0)][-4:]
