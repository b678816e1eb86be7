"""The runs of the study, by CPU time, and the files that keep them. A run that is kept is not repeated."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from studies.pinn.entrants import Entrant, TimeIsUp
from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import Points, Problem, inputs_of, start
from studies.pinn.problems.sampling import generator
from studies.pinn.registry import FAMILIES
from tengrad_triton.files import replacing
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.machine import describe

SEEDS = (0, 1, 2)
POINTS_SEED = 1000  # added to a seed for the points, which shall not be the random numbers of the weights
FIRST, MANTISSAS = -1, (1, 1.5, 2, 3, 5, 7)  # errors are measured from 0.1 CPU seconds on


class Point(NamedTuple):
    """An error, and the steps and the CPU seconds of stepping before it."""

    step: int
    seconds: float
    error: float


@dataclass(frozen=True)
class Case:
    """A family's setting on a problem, for some CPU seconds, with a seed for weights and points."""

    problem: str
    family: str
    variant: str
    seconds: float
    seed: int

    @property
    def file(self) -> str:
        """The name of the run's file."""
        return f"{self.problem}-{self.family}-{self.variant}-{self.seconds:g}s-seed{self.seed}.json"

    @property
    def fingerprint(self) -> str:
        """A digest of the problem: a change makes the run invalid."""
        return description(self.problem)

    def build(self, model: nn.Module) -> Entrant:
        """Return the entrant; an optimizer that refuses the problem raises an error of its own."""
        return FAMILIES[self.family][self.variant](PROBLEMS[self.problem], model)

    @property
    def setting(self) -> str:
        """The settings of today in words; empty if the optimizer refuses the problem."""
        try:
            return self.build(start(PROBLEMS[self.problem], self.seed)).setting
        except Exception:  # the run, which has the same error, keeps it
            return ""


@cache
def description(name: str) -> str:
    """Return a digest of a problem's title, weights, parameters and points of seed 0, with their residuals."""
    problem = PROBLEMS[name]
    model, points = start(problem, 0), problem.points(generator(0))
    terms = problem.terms(model)
    values = {name: terms[name](*inputs_of(given)).square().mean().item() for name, given in points.items()}
    sizes = {name: [tuple(x.shape) for x in inputs_of(given)] for name, given in points.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    short = {name: f"{value:.6g}" for name, value in values.items()}  # the last digits depend on the machine
    words = [problem.title, dict(problem.weights), parameters, problem.fresh_every, sizes, short, problem.measured]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """The results of a case.

    Attributes:
        name: the optimizer.
        setting: its settings in words.
        points: the errors, the first one before any step; those of a run that failed end before the failure.
        failure: how it failed, in words, or empty.
        wall: the seconds of the whole run by a wall clock.
        load: the machine's load average at the start and at the end.
        machine: the processor, the versions and the commit.
    """

    case: Case
    name: str
    setting: str
    points: tuple[Point, ...]
    failure: str
    wall: float
    load: tuple[float, float]
    machine: dict[str, str]

    @property
    def end(self) -> float:
        """The error at the end; infinite if the run failed, for a setting that fails is never the best."""
        return math.inf if self.failure else self.error_at(self.case.seconds)

    def error_at(self, seconds: float) -> float:
        """Return the last error that was measured by then, give or take a tenth; infinite after a failure.

        So a step that lasts much longer than the time that is left counts for nothing.
        """
        is_over = bool(self.failure) and self.points[-1].seconds < min(seconds, self.case.seconds)
        return math.inf if is_over else [point.error for point in self.points if point.seconds <= 1.1 * seconds][-1]

    def seconds_to(self, error: float) -> float:
        """Return the CPU seconds at the first measured error that is as low; infinite if there is none."""
        return next((point.seconds for point in self.points if point.error <= error), math.inf)


class Store:
    """A folder with a file for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, case: Case) -> Run | None:
        """Return the run of a case, or None if it was not run, or on another problem than that of today."""
        kept = self.read(case.file)
        if kept is None or kept.pop("fingerprint") != case.fingerprint:
            return None
        points, load = tuple(Point(*point) for point in kept["points"]), tuple(kept["load"])
        return Run(**kept | {"case": case, "points": points, "load": load})

    def keep(self, run: Run) -> None:
        """Write a run."""
        self.write(run.case.file, asdict(run) | {"fingerprint": run.case.fingerprint})

    def cases(self) -> list[Case]:
        """Return the cases of all kept runs."""
        kept = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*-seed*.json")))
        return [Case(**one["case"]) for one in kept]

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the content of a file, or None if it is missing."""
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file whole."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def cpu_seconds() -> float:
    """Return the CPU seconds of this process so far, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def schedule(seconds: float) -> list[float]:
    """Return the CPU seconds at which errors are measured: 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, …, and the end."""
    rising = (m * 10.0**power for power in count(FIRST) for m in MANTISSAS)
    return [*takewhile(lambda at: at < 0.99 * seconds, rising), seconds]


@dataclass
class Clock:
    """The CPU time of the steps of one run: of the process, which has one thread here, and of compilers that it starts.

    Attributes:
        seconds: the time of the run.
        measure: returns the error of the model; its time does not count.
        points: what was measured.
        used: the CPU seconds of all steps so far.
        steps: the number of steps so far; for a solver with a loop of its own, of its pauses.
    """

    seconds: float
    measure: Callable[[], float]
    points: list[Point] = field(default_factory=list)
    used: float = 0.0
    steps: int = 0
    _since: float = 0.0

    def __post_init__(self) -> None:
        self._due = schedule(self.seconds)
        self.points.append(Point(0, 0.0, self.measure()))

    def go(self) -> None:
        """Let the time run."""
        self._since = cpu_seconds()

    def pause(self) -> None:
        """Count the time since `go`, measure if it is due, and let the time run again.

        Raises `TimeIsUp` at the end, and `FloatingPointError` for an error that is not finite.
        """
        self.used += cpu_seconds() - self._since
        self.steps += 1
        if self.used >= self._due[0]:
            self._due = [at for at in self._due if at > self.used]
            self._measure()
        if self.used >= self.seconds:
            raise TimeIsUp
        self.go()

    def _measure(self) -> None:
        error = self.measure()
        if not math.isfinite(error):
            raise FloatingPointError(f"the error is not finite after {self.steps} steps")
        self.points.append(Point(self.steps, self.used, error))


def draws(problem: Problem, is_fixed: bool, seed: int) -> Iterator[Points]:
    """Yield the points of each step."""
    random = generator(POINTS_SEED + seed)
    every = 0 if is_fixed else problem.fresh_every
    points = problem.points(random)
    for step in count():
        if every and step and step % every == 0:
            points = problem.points(random)
        yield points


def machine() -> dict[str, str]:
    """Return the processor, the versions and the commit."""
    known = describe(torch.device("cpu"))
    return {key: str(known[key]) for key in ("device", "python", "torch", "commit")}


def train(case: Case, machine: dict[str, str]) -> Run:
    """Run a case; ``machine`` says where. An error of the entrant ends the run, and is kept with it.

    Raises `UsageError` if the entrant needs a package that is not installed: that is no result.
    """
    problem = PROBLEMS[case.problem]
    began, load = time.perf_counter(), os.getloadavg()[0]
    model = start(problem, case.seed)
    clock = Clock(case.seconds, lambda: problem.error(model))
    name, setting, failure = case.family, "", ""
    try:
        entrant = case.build(model)
        name, setting, entrant.pause = entrant.name, entrant.setting, partial(_pause, clock, entrant)
        entrant.schedule(0.0)
        for points in draws(problem, entrant.fixed_points, case.seed):
            clock.go()
            entrant.step(points)
            entrant.pause()
    except UsageError:
        raise
    except TimeIsUp:
        if clock.points[-1].error > clock.points[0].error:
            failure = "above its start"
    except Exception as error:  # whatever an entrant raises is a result of the study
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Run(
        case, name, setting, tuple(map(_short, clock.points)), failure,
        wall=round(time.perf_counter() - began, 1), load=(load, os.getloadavg()[0]), machine=machine,
    )  # fmt: skip


def _pause(clock: Clock, entrant: Entrant) -> None:
    clock.pause()
    entrant.schedule(clock.used / clock.seconds)


def _short(point: Point) -> Point:
    return Point(point.step, float(f"{point.seconds:.5g}"), float(f"{point.error:.5g}"))


def best(store: Store, problem: str, family: str, seconds: float, seed: int) -> str | None:
    """Return the setting of a family with the lowest last error for a seed, or None if one was not run.

    Of those that all fail it is the first.
    """
    runs = {name: store.run(Case(problem, family, name, seconds, seed)) for name in FAMILIES[family]}
    known = {name: run for name, run in runs.items() if run is not None}
    return min(known, key=lambda name: known[name].end) if len(known) == len(runs) else None
