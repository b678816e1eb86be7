"""Carries out `tengrad-triton paper`: estimates, the runs that are left, the measurements, and the report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tengrad_triton.files import reason
from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.data.registry import DatasetName, load
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.estimates import Estimate, check_memory, estimate
from tengrad_triton.recipes.paper.measurements.measure import measure
from tengrad_triton.recipes.paper.report.document import check_folder, note_command
from tengrad_triton.recipes.paper.report.write import write
from tengrad_triton.recipes.paper.request import Request, expand_all
from tengrad_triton.recipes.paper.runs import PaperRun, runs_of
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.metrics_files import epochs_json
from tengrad_triton.recipes.training.run import check_installed, train_all, warm_up_all
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

Kind = tuple[str, OptimizerName]  # an experiment's title and an optimizer: runs of one kind take the same time


@dataclass(frozen=True)
class Shared:
    """What all runs share: the request, the device, and each data set, which is loaded once."""

    request: Request
    console: Console
    device: torch.device
    loaded: dict[tuple[DatasetName, int | None, int | None], Data] = field(default_factory=dict)

    def job(self, settings: Settings) -> Job:
        """Return the job of a run."""
        key = (settings.dataset, settings.train_limit, settings.test_limit)
        if key not in self.loaded:
            self.loaded[key] = load(settings.dataset, settings.data, *key[1:], self.console).to(self.device)
        return Job(settings, self.loaded[key], self.device)


def execute(targets: tuple[str, ...], request: Request, command: Sequence[str], console: Console) -> None:
    """Run and measure what the output folder lacks, and write the report.

    Raises `UsageError` if the request cannot be carried out, and `InterruptedRunError` on Ctrl-C.
    """
    targets = expand_all(targets)
    for name in request.optimizer:
        check_installed(name)
    runs = runs_of(request, targets)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    shared = Shared(request, console, machine.chosen_device(request.device))
    if not request.estimate:
        check_folder(request.out)
    with _advice_on_failure(request):
        left = [run for run in runs if run.outcome(request.out) is None]
        _show_estimates(left, shared, len(runs))
        if request.estimate:
            return
        request.out.mkdir(parents=True, exist_ok=True)
        note_command(request, targets, command)
        for number, run in enumerate(left, 1):
            console.print(f"run {number} of {len(left)}: {run.experiment.title}, {run.label}", highlight=False)
            train(run, shared)
        measure(targets, shared.job, request, console)
        pages = write(request.out)
    console.print(f"report: {', '.join(map(str, pages))}", soft_wrap=True, highlight=False)


@contextmanager
def _advice_on_failure(request: Request) -> Iterator[None]:
    """Turn Ctrl-C and errors of the disk into errors which say that the same command resumes the work."""
    advice = f"give the same command again to go on from what {request.out} has"
    try:
        yield
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted: {advice}") from stop
    except OSError as error:
        raise UsageError(
            f"{error.filename or request.out}: cannot be written ({reason(error)}): make room, and {advice}"
        ) from error


def _show_estimates(left: Sequence[PaperRun], shared: Shared, total: int) -> None:
    """Time the first steps of each kind of run; raises `UsageError` if one needs more memory than is free."""
    estimates: dict[Kind, tuple[Estimate, int]] = {}
    for run in left:
        kind = (run.experiment.title, run.name)
        known, count = estimates.get(kind, (None, 0))
        estimates[kind] = (known or estimate(shared.job(run.settings), run.name), count + 1)
    line = f"{total} runs, {len(left)} of them to do; scale: {shared.request.scale.description()}"
    shared.console.print(line, soft_wrap=True, highlight=False)
    if estimates:
        shared.console.print(_table(estimates))


def _table(estimates: dict[Kind, tuple[Estimate, int]]) -> Table:
    seconds = sum(one.seconds * count for one, count in estimates.values())
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=f"estimated from first steps: {duration(seconds)} in all")
    for heading in ("row", "optimizer", "runs", "steps", "a step", "a run"):
        table.add_column(heading, justify="left" if heading in ("row", "optimizer") else "right", no_wrap=True)
    for (title, name), (one, count) in estimates.items():
        cells = (f"{count}", f"{one.steps}", f"{1e3 * one.step:.1f} ms", duration(one.seconds))
        table.add_row(title, name, *cells)
    return table


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train(run: PaperRun, shared: Shared) -> None:
    """Train from the last whole epoch to the end, write outcome.json, and delete the checkpoint, which can be large."""
    path = run.folder(shared.request.out)
    if run.outcome(shared.request.out) is not None:
        return  # another process has trained it meanwhile
    folder = RunFolder(path)
    if not (path / "settings.json").exists():
        with suppress(OSError):
            (path / "checkpoints").rmdir()  # a process may have been killed before it wrote the settings
        folder = RunFolder.create(path, run.settings)
    job = shared.job(run.settings)
    check_memory(job, run.name)
    history = train_all(job, folder, warm_up_all(job), shared.console)
    record = history[run.name]
    steps_S = record.steps.durations()
    outcome: dict[str, Any] = {
        "rows": epochs_json(history),
        "diverged": record.diverged,
        "median_step_seconds": steps_S.median().item() if len(steps_S) else None,
    }
    folder.write_json("outcome.json", outcome)
    folder.delete_checkpoint(run.name)
