"""The runs of the study, and the files that keep them. A run that has its file is not repeated."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studies import optimizers
from studies.problems import PROBLEMS
from studies.problems.base import Problem, Task
from tengrad_triton.files import replacing
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.options import UNSCALED

POINTS = 8  # evaluations in a run
SEEDS = (0, 1, 2)
ABLATIONS: dict[str, dict[str, Any]] = {
    "the identity as D": dict(UNSCALED),
    "D alone": {"damping": 1e6},
    "damping 3": {"damping": 3.0},
    "damping 30": {"damping": 30.0},
    "diagonal D": {"scaling": "diagonal"},
    "no bound": {"clip_threshold": None},
    "no look-ahead": {"nesterov": False},
    "every 20th from the start": {"refresh_every": 20},
    "at most every 40th": {"refresh_every": Growing(40)},
    "32 rows": {"fisher_rows": 32},
    "history of 4": {"history": 4},
}
"""Changes to TENGraD's defaults, one at a time, that show what each default does."""


@dataclass(frozen=True)
class Case:
    """The name of a run: ``factor`` multiplies the default learning rate, ``change`` is in `ABLATIONS` or empty."""

    problem: str
    optimizer: str
    factor: float
    seed: int
    change: str = ""

    @property
    def lr(self) -> float:
        """The learning rate."""
        change = ABLATIONS.get(self.change, {})
        return change.get("lr", optimizers.default_lr(self.optimizer)) * self.factor

    @property
    def file(self) -> str:
        """The name of the run's file."""
        factor = f"{self.factor:g}" if self.factor >= 1 else f"{self.factor:.2g}"
        words = [self.problem, self.optimizer, *self.change.split(), f"lr{factor}", f"seed{self.seed}"]
        return f"{'-'.join(words)}.json"

    @property
    def fingerprint(self) -> dict[str, str]:
        """Everything else that the run depends on, except the machine and the versions: a change makes it invalid."""
        settings = optimizers.settings_of(self.optimizer, ABLATIONS.get(self.change, {}))
        words = {name: repr(value) for name, value in settings.items()}
        return {**words, "lr": f"{self.lr:.6g}", "problem": size_of(PROBLEMS[self.problem])}


@cache
def size_of(problem: Problem) -> str:
    """Return what the runs of a problem depend on, in words."""
    with torch.random.fork_rng(devices=[]):
        count = sum(parameter.numel() for parameter in problem.build().parameters())
    return f"{problem.title}: {count} parameters, {problem.steps} steps"


@dataclass(frozen=True)
class Run:
    """The results of a case.

    Attributes:
        steps: the number of steps before each evaluation; a run ends early if a loss is not finite, or at an error.
        loss: the test loss at each evaluation.
        quality: the quality at each evaluation.
        train_loss: the mean training loss between two evaluations.
        diverged: whether the run ended early, or the last value of ``train_loss`` was above the first loss.
        commit: of the code.
        error: the type and the first line of the error that ended the run, or empty.
    """

    case: Case
    lr: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    quality: tuple[float, ...]
    train_loss: tuple[float, ...]
    diverged: bool
    commit: str
    error: str = ""

    @property
    def failure(self) -> str:
        """How the run failed, in words, or empty."""
        if self.error:
            return f"crashed: {self.error}"
        if not self.diverged:
            return ""
        return "above its start" if len(self.steps) == POINTS else "not finite"


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
        """Return the run of a case, or None if it was not run, or with other settings than those of today."""
        kept = self.read(case.file)
        if kept is None or kept.get("fingerprint") != case.fingerprint:
            return None
        lists = {name: tuple(kept[name]) for name in ("steps", "loss", "quality", "train_loss")}
        return Run(case, kept["lr"], diverged=kept["diverged"], commit=kept["commit"], error=kept["error"], **lists)

    def keep(self, run: Run) -> None:
        """Write a run."""
        self.write(run.case.file, asdict(run) | {"fingerprint": run.case.fingerprint})


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
    problem = PROBLEMS[case.problem]
    torch.manual_seed(case.seed)
    model = problem.build()
    task.prepare(model)
    change = {name: value for name, value in ABLATIONS.get(case.change, {}).items() if name != "lr"}
    return model, optimizers.build(case.optimizer, model, case.lr, problem.likelihood, case.seed, change)


def train(case: Case, data: Path, commit: str) -> Run:
    """Train a case; ``commit`` is that of the code. An error of the optimizer ends the run, and is kept with it."""
    task = PROBLEMS[case.problem].task(data)
    losses: list[float] = []
    evaluated: list[dict[str, float]] = []
    try:
        model, optimizer = start(case, task)
    except ImportError:  # a missing package says nothing of the optimizer
        raise
    except Exception as error:  # anything else that an optimizer raises is a result of the study
        return _run_of(case, losses, evaluated, commit, _first_line(error))
    failure = _steps(case, task, model, optimizer, losses, evaluated)
    optimizers.close(optimizer)
    return _run_of(case, losses, evaluated, commit, failure)


def _steps(
    case: Case,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    evaluated: list[dict[str, float]],
) -> str:
    """Take the steps, append to the losses and to the evaluations, and return the error that ended them, or nothing."""
    steps = PROBLEMS[case.problem].steps
    for number, batch in zip(range(1, steps + 1), task.batches(case.seed), strict=False):
        try:
            losses.append(step(model, optimizer, task, batch))
        except Exception as error:
            return _first_line(error)
        if not math.isfinite(losses[-1]):
            break
        if number % (steps // POINTS) == 0:
            evaluated.append(task.evaluate(model))
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _run_of(case: Case, losses: list[float], evaluated: list[dict[str, float]], commit: str, error: str) -> Run:
    every = PROBLEMS[case.problem].steps // POINTS
    finite = [point for point in evaluated if math.isfinite(point["loss"])]
    means = [statistics.mean(losses[i * every : (i + 1) * every]) for i in range(len(finite))]
    return Run(
        case=case,
        lr=case.lr,
        steps=tuple(every * (i + 1) for i in range(len(finite))),
        loss=tuple(point["loss"] for point in finite),
        quality=tuple(point["quality"] for point in finite),
        train_loss=tuple(means),
        diverged=len(finite) < POINTS or means[-1] > losses[0],
        commit=commit,
        error=error,
    )


def of(store: Store, problem: str, optimizer: str, factor: float, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Return the existing runs of an optimizer at one learning rate."""
    found = (store.run(Case(problem, optimizer, factor, seed)) for seed in seeds)
    return [run for run in found if run is not None]
