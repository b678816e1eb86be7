"""The runs of the study, and the file of each problem that keeps them. A run that is kept is not repeated."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from studies import optimizers
from studies.problems import PROBLEMS
from studies.problems.base import Problem, Task
from studies.runs import size_of
from studies.tuning.grid import Setting
from tengrad_triton import TENGraD
from tengrad_triton.files import replacing
from tengrad_triton.likelihoods import Categorical
from tengrad_triton.optim.options import PAPER, UNSCALED

POINTS = 4  # evaluations in a run
RATES = {"tengrad": optimizers.default_lr("tengrad"), "unscaled": UNSCALED["lr"], "paper": PAPER["lr"], "adamw": 1e-3}
LAST = 8  # the share of the steps, 1 / LAST, over which the numbers at the end are means


@dataclass(frozen=True)
class Case:
    """A setting on a problem with a seed."""

    problem: str
    setting: Setting
    seed: int

    @property
    def lr(self) -> float:
        """The learning rate, before its schedule."""
        return RATES[self.setting.method] * self.setting.factor

    @property
    def steps(self) -> int:
        """The number of steps."""
        return round(PROBLEMS[self.problem].steps / self.setting.batch)

    @property
    def fingerprint(self) -> str:
        """A digest of all that the run depends on, except the machine and the versions: a change makes it invalid."""
        own = {**asdict(self.setting), "change": {k: repr(v) for k, v in self.setting.change.items()}}
        del own["only_first"]  # which seeds there are says nothing of a run
        known = inspect.signature(TENGraD).parameters.items()
        defaults = {name: repr(p.default) for name, p in known if name not in optimizers.WITHOUT_EFFECT}
        others = {"unscaled": repr(dict(UNSCALED)), "paper": repr(dict(PAPER))}.get(self.setting.method, "")
        used = "" if self.setting.method == "adamw" else repr(sorted(defaults.items()))
        words = json.dumps([own, used, others, self.lr, size_of(PROBLEMS[self.problem]), POINTS])
        return hashlib.sha256(words.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """The results of a case.

    Attributes:
        loss: the test loss at each of `POINTS` evaluations; a run ends early if a loss is not finite, or at an error.
        quality: the quality at each evaluation.
        train_loss: the mean training loss of the last eighth of the steps.
        failure: how the run failed, in words, or empty.
        warning: the first warning, or empty.
        clipped: the share of blocks and steps that `clip_threshold` shortened, for each eighth of the steps.
        region: the mean of what the trust region multiplied steps by, for each eighth of the steps.
        damping: the setting ``damping`` at the end.
        commit: of the code.
    """

    problem: str
    key: str
    seed: int
    loss: tuple[float, ...]
    quality: tuple[float, ...]
    train_loss: float | None
    failure: str
    warning: str
    clipped: tuple[float, ...]
    region: tuple[float, ...]
    damping: float | None
    commit: str


class Store:
    """A folder with a file for each problem, which has a line of JSON for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, case: Case) -> Run | None:
        """Return the run of a case, or None if it was not run, or with other settings than those of today."""
        kept = self._read(case.problem).get((case.setting.key, case.seed))
        if kept is None or kept["fingerprint"] != case.fingerprint:
            return None
        return Run(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k != "fingerprint"})

    def keep(self, case: Case, run: Run) -> None:
        """Write a run into the file of its problem."""
        kept = self._read(case.problem)
        kept[run.key, run.seed] = {**asdict(run), "fingerprint": case.fingerprint}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{case.problem}.jsonl") as temporary:
            lines = (json.dumps(kept[key], allow_nan=False, ensure_ascii=False) for key in sorted(kept))
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _read(self, problem: str) -> dict[tuple[str, int], dict[str, Any]]:
        file = self.folder / f"{problem}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {(one["key"], one["seed"]): one for one in map(json.loads, lines)}


@dataclass
class Log:
    """What the steps of a run leave behind."""

    losses: list[float] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    region: list[float] = field(default_factory=list)

    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what bounded the last step."""
        if not isinstance(optimizer, TENGraD):
            return
        stats = optimizer.stats
        if stats.clip:
            self.clipped.append(statistics.mean(factor < 1 for factor in stats.clip.values()))
        if stats.trust_region is not None:
            self.region.append(stats.trust_region)


def train(case: Case, data: Path, commit: str) -> Run:
    """Train a case; ``commit`` is that of the code. An error of the optimizer ends the run, and is kept with it."""
    log, failure, damping = Log(), "", None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            task, model, optimizer = _start(case, data)
            _steps(case, task, model, optimizer, log)
            damping = optimizer.param_groups[0].get("damping")
            optimizers.close(optimizer)
        except (ValueError, TypeError, RuntimeError) as error:  # what an optimizer raises is a result of the study
            failure = f"refused: {(str(error).splitlines() or [''])[0]}"
    said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    if not failure and not (log.losses and math.isfinite(log.losses[-1])):
        failure = "not finite"
    last = log.losses[-max(1, len(log.losses) // LAST) :]
    if not failure and statistics.mean(last) > log.losses[0]:
        failure = "above its start"
    return Run(
        case.problem, case.setting.key, case.seed,
        loss=tuple(_short(point["loss"]) for point in log.points if math.isfinite(point["loss"])),
        quality=tuple(_short(point["quality"]) for point in log.points if math.isfinite(point["loss"])),
        train_loss=_short(statistics.mean(last)) if last and math.isfinite(last[-1]) else None,
        failure=failure, warning=said[0] if said else "", clipped=_eighths(log.clipped), region=_eighths(log.region),
        damping=None if damping is None else _short(damping), commit=commit,
    )  # fmt: skip


def _start(case: Case, data: Path) -> tuple[Task, nn.Module, torch.optim.Optimizer]:
    """Return the task, the model with its first weights, which depend on the seed alone, and its optimizer."""
    problem, setting = PROBLEMS[case.problem], case.setting
    task: Any = problem.task(data)
    if setting.batch != 1:
        task = replace(task, batch=round(task.batch * setting.batch))
    torch.manual_seed(case.seed)
    model = problem.build()
    task.prepare(model)
    if setting.method == "adamw":
        return task, model, optimizers.build("adamw", model, case.lr, problem.likelihood, case.seed, {})
    made = {"tengrad": TENGraD, "unscaled": TENGraD.unscaled, "paper": TENGraD.paper}[setting.method]
    said = {"lr": case.lr, "likelihood": _likelihood(problem, setting), "seed": case.seed, **setting.change}
    return task, model, made(model, **said)


def _likelihood(problem: Problem, setting: Setting) -> Any:
    if setting.likelihood:
        return setting.likelihood
    return Categorical(dim=1) if problem.likelihood == "tokens" else problem.likelihood


def _steps(case: Case, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, log: Log) -> None:
    """Take the steps of a run, until one has an output that is not finite."""
    setting, steps = case.setting, case.steps
    scheduler = LambdaLR(optimizer, lambda step: setting.rate(step, steps))
    for number, batch in _counted(task, case.seed, steps):
        loss = _step(setting, task, model, optimizer, batch)
        log.losses.append(loss)
        if not math.isfinite(loss):
            return
        log.read(optimizer)
        scheduler.step()
        if number % (steps // POINTS) == 0 and len(log.points) < POINTS:
            log.points.append(task.evaluate(model))


def _counted(task: Task, seed: int, steps: int) -> Iterator[tuple[int, Any]]:
    yield from zip(range(1, steps + 1), task.batches(seed), strict=False)


def _step(setting: Setting, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """Take one step, and return the mean loss before it; NaN, without a step, if the output is not finite."""
    x, y = batch
    samples = len(x) if setting.sums else 1

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = samples * task.loss(model(x), y)
        loss.backward()
        if setting.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip_grad)
        return loss

    if isinstance(optimizer, TENGraD) and optimizer.adapts:
        loss: Any = optimizer.step(evaluate)
        return loss.item()
    loss = evaluate()
    if not loss.isfinite():
        return math.nan
    optimizer.step()
    return loss.item() / samples


def _eighths(numbers: list[float]) -> tuple[float, ...]:
    """Return the mean of each eighth of some numbers, if there are enough."""
    every = len(numbers) // LAST
    return tuple(_short(statistics.mean(numbers[i * every : (i + 1) * every])) for i in range(LAST)) if every else ()


def _short(number: float) -> float:
    return float(f"{number:.4g}")
