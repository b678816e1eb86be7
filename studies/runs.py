"""The runs of the study, and the files that keep them. A run that has its file is not repeated."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studies.optimizers import BUILDERS, DEFAULT_LR, FACTORS, close
from studies.problems import PROBLEMS, Task
from tengrad_triton.recipes.files import replacing

POINTS = 8  # evaluations in a run
SEEDS = (0, 1, 2)
ABLATIONS: dict[str, dict[str, Any]] = {
    "absolute damping": {"damping": 0.1, "relative_damping": False},
    "no trust region": {"trust_region": None},
    "no look-ahead": {"nesterov": False},
    "every tenth from the start": {"refresh_every": 10},
    "history of 4": {"history": 4},
}
"""Changes to TENGraD's defaults, one at a time, that show what each default does."""


@dataclass(frozen=True)
class Case:
    """Everything a run depends on, except the machine and the versions; ``change`` is one of `ABLATIONS`, or empty."""

    problem: str
    optimizer: str
    factor: float
    seed: int
    change: str = ""

    @property
    def lr(self) -> float:
        """The learning rate."""
        return DEFAULT_LR[self.optimizer] * self.factor

    @property
    def file(self) -> str:
        """The name of the run's file."""
        words = [self.problem, self.optimizer, *self.change.split(), f"lr{self.factor:.2g}", f"seed{self.seed}"]
        return f"{'-'.join(words)}.json"


@dataclass(frozen=True)
class Run:
    """The results of a case.

    Attributes:
        steps: the number of steps before each evaluation; a run ends early if a loss is not finite.
        loss: the test loss at each evaluation.
        quality: the quality at each evaluation.
        train_loss: the mean training loss between two evaluations.
        diverged: whether a loss was not finite, or the last value of ``train_loss`` was above the first loss.
    """

    case: Case
    lr: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    quality: tuple[float, ...]
    train_loss: tuple[float, ...]
    diverged: bool
    commit: str


class Store:
    """A folder with a file for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file whole."""
        with replacing(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")

    def read(self, name: str) -> Any | None:
        """Return the content of a file, or None if it is missing."""
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def run(self, case: Case) -> Run | None:
        """Return the run of a case, or None if it was not run."""
        kept = self.read(case.file)
        if kept is None:
            return None
        lists = {name: tuple(kept[name]) for name in ("steps", "loss", "quality", "train_loss")}
        return Run(case, kept["lr"], diverged=kept["diverged"], commit=kept["commit"], **lists)

    def keep(self, run: Run) -> None:
        """Write a run."""
        self.write(run.case.file, asdict(run))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Any) -> float:
    """Take one step, and return the loss before it; NaN, without a step, if the output is not finite."""
    x, y = batch
    optimizer.zero_grad()
    output = model(x)
    if not output.isfinite().all():
        return math.nan
    loss = task.loss(output, y)
    loss.backward()
    optimizer.step()
    return loss.item()


def start(case: Case, task: Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model with its first weights, which depend on the seed alone, and its optimizer."""
    torch.manual_seed(case.seed)
    model = PROBLEMS[case.problem].build()
    settings = ABLATIONS.get(case.change, {})
    return model, BUILDERS[case.optimizer](model, case.lr, task.likelihood, case.seed, **settings)


def train(case: Case, data: Path, commit: str) -> Run:
    """Train a case; ``commit`` is that of the code."""
    problem = PROBLEMS[case.problem]
    task = problem.task(data)
    model, optimizer = start(case, task)
    every = problem.steps // POINTS
    losses: list[float] = []
    evaluated: list[dict[str, float]] = []
    for number, batch in zip(range(1, problem.steps + 1), task.batches(case.seed), strict=False):
        losses.append(step(model, optimizer, task, batch))
        if not math.isfinite(losses[-1]):
            break
        if number % every == 0:
            evaluated.append(task.evaluate(model))
    close(optimizer)
    finite = [point for point in evaluated if math.isfinite(point["loss"])]
    means = [statistics.mean(losses[i * every : (i + 1) * every]) for i in range(len(finite))]
    return Run(
        case=case,
        lr=case.lr,
        steps=tuple(every * (i + 1) for i in range(len(finite))),
        loss=tuple(point["loss"] for point in finite),
        quality=tuple(point[task.quality] for point in finite),
        train_loss=tuple(means),
        diverged=len(finite) < POINTS or means[-1] > losses[0],
        commit=commit,
    )


def defaults_of(problem: str, store: Store) -> Iterator[Case]:
    """Yield every optimizer with its defaults, and TENGraD with all its learning rates."""
    for seed in SEEDS:
        yield from (Case(problem, name, 1, seed) for name in BUILDERS if takes_part(problem, name))
        yield from (Case(problem, "tengrad", factor, seed) for factor in FACTORS["tengrad"])


def grid_of(problem: str, store: Store) -> Iterator[Case]:
    """Yield all learning rates with the first seed."""
    for name in BUILDERS:
        yield from (Case(problem, name, factor, SEEDS[0]) for factor in FACTORS[name] if takes_part(problem, name))


def tuned_of(problem: str, store: Store) -> Iterator[Case]:
    """Yield the best learning rate of each optimizer with every seed."""
    for name in BUILDERS:
        best = tuned(problem, name, store)
        yield from (Case(problem, name, best, seed) for seed in SEEDS if takes_part(problem, name))


def ablations_of(problem: str, store: Store) -> Iterator[Case]:
    """Yield TENGraD with one of its defaults changed."""
    yield from (Case(problem, "tengrad", 1, SEEDS[0], change) for change in ABLATIONS)


STAGES = (defaults_of, grid_of, tuned_of, ablations_of)
"""Each stage runs for all problems before the next one; it may use the results of the stages before it."""


def takes_part(problem: str, optimizer: str) -> bool:
    """Return whether an optimizer suits a problem: Muon needs a hidden matrix."""
    return optimizer != "muon" or problem != "resnet"


def tuned(problem: str, optimizer: str, store: Store) -> float:
    """Return the factor of the learning rate with the lowest last loss of the first seed."""
    runs = [store.run(Case(problem, optimizer, factor, SEEDS[0])) for factor in FACTORS[optimizer]]
    ends = {run.case.factor: run.loss[-1] for run in runs if run is not None and not run.diverged}
    return min(ends, key=ends.__getitem__, default=1)


def of(store: Store, problem: str, optimizer: str, factor: float, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Return the existing runs of an optimizer at one learning rate."""
    found = (store.run(Case(problem, optimizer, factor, seed)) for seed in seeds)
    return [run for run in found if run is not None]
