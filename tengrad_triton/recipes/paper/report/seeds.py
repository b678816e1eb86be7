"""Several seeds together: means with their spread, and the training time to an accuracy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Epochs = Sequence[Mapping[str, Any]]  # the content of metrics.json: a number that is not finite is None
LEVELS = (50, 60, 70, 75, 80, 82, 84, 86, 88, 90, 91, 92, 93, 94, 95)  # percent


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and their standard deviation: 0 if there is one seed."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value or more."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        epochs: the metrics of each epoch.
        tuned: the values of the hyperparameters that the paper tunes.
        clock_column: the name of the metric that measures time, in seconds.
    """

    optimizer: str
    seed: int
    epochs: Epochs
    diverged: bool
    tuned: Mapping[str, float]
    clock_column: str

    def accuracies(self, part: str = "test") -> list[float]:
        """Return the accuracy after each epoch, in percent."""
        return [100 * epoch[f"{part}_accuracy"] for epoch in self.epochs]

    def clock(self) -> list[float]:
        """Return the seconds of training until the end of each epoch, without evaluations."""
        return list(accumulate(epoch[self.clock_column] for epoch in self.epochs))

    def top(self) -> tuple[float, float]:
        """Return the best test accuracy in percent, and the seconds of training until it was reached."""
        accuracies = self.accuracies()
        best = max(accuracies)
        return best, self.clock()[accuracies.index(best)]

    def time_to(self, accuracy: float) -> float | None:
        """Return the seconds to the first epoch with a test accuracy of at least ``accuracy`` percent, or None."""
        reached = (t for t, a in zip(self.clock(), self.accuracies(), strict=True) if a >= accuracy)
        return next(reached, None)


def by_optimizer(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Return the runs of each optimizer."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.optimizer, []).append(run)
    return groups


def by_epoch(runs: Sequence[Finished], quantity: str, scale: float) -> tuple[list[Spread], list[float]]:
    """Return the spread of a metric times ``scale``, and the mean seconds of training, after each epoch of all runs."""
    epochs = min(len(run.epochs) for run in runs)
    values = [[run.epochs[e][quantity] for run in runs] for e in range(epochs)]
    spreads = [Spread.of([math.nan if value is None else scale * value for value in at]) for at in values]
    clocks = [run.clock() for run in runs]
    return spreads, [statistics.mean(clock[e] for clock in clocks) for e in range(epochs)]


def times_to(runs: Sequence[Finished], accuracy: float) -> tuple[Spread | None, int]:
    """Return the spread of the seconds to an accuracy over the runs that reach it, and the number of these runs."""
    times = [time for run in runs if (time := run.time_to(accuracy)) is not None]
    return Spread.of(times) if times else None, len(times)


def levels(groups: Mapping[str, Sequence[Finished]]) -> list[int]:
    """Return the four highest of `LEVELS` that all runs of some optimizer reach."""
    sound = [[run for run in runs if not run.diverged] for runs in groups.values()]
    least = [min(run.top()[0] for run in runs) for runs in sound if runs]
    return [level for level in LEVELS if level <= max(least, default=0)][-4:]
