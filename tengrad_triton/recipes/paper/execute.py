"""Carries out `tengrad-triton paper`: estimates, the runs that are left, the measurements, and the report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import torch
from rich.console import Console

from tengrad_triton.files import reason
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.paper.forecast import Left, forecast
from tengrad_triton.recipes.paper.measurements.costs import COSTS
from tengrad_triton.recipes.paper.measurements.measure import measure, unmeasured
from tengrad_triton.recipes.paper.memory import check_run
from tengrad_triton.recipes.paper.report.document import check_folder, note_command
from tengrad_triton.recipes.paper.report.write import write
from tengrad_triton.recipes.paper.request import Request, expand_all
from tengrad_triton.recipes.paper.runs import PaperRun, runs_of
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.paper.table import table_of
from tengrad_triton.recipes.training.metrics_files import epochs_json
from tengrad_triton.recipes.training.run import check_installed, train_all, warm_up_all
from tengrad_triton.recipes.training.run_folder import RunFolder


def execute(targets: tuple[str, ...], request: Request, command: Sequence[str], console: Console) -> None:
    """Run and measure what the output folder lacks, and write the report.

    Raises `UsageError` if the request cannot be carried out, and `InterruptedRunError` on Ctrl-C.
    """
    targets = expand_all(targets)
    for name in request.optimizer:
        check_installed(name)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    shared = Shared(request, console, machine.chosen_device(request.device))
    if not request.estimate:
        check_folder(request.out)
    with _advice_on_failure(request):
        left = _left(targets, shared)
        if left:
            rows = forecast(left, shared)
            console.print(table_of(rows, datetime.now()))
        if request.estimate:
            return
        request.out.mkdir(parents=True, exist_ok=True)
        note_command(request, targets, command)
        for number, run in enumerate(left.runs, 1):
            shared.say(f"run {number} of {len(left.runs)}: {run.experiment.title}, {run.label}")
            train(run, shared)
        measure(left.measurements, shared)
        shared.say("writing the report")
        pages = write(request.out)
    shared.say(f"report: {', '.join(map(str, pages))}")


def _left(targets: tuple[str, ...], shared: Shared) -> Left:
    """Return what the output folder lacks, and say what it has."""
    request = shared.request
    runs = runs_of(request, targets)
    left = Left([run for run in runs if run.outcome(request.out) is None], unmeasured(targets, request))
    measured = [target for target in targets if target in COSTS and target not in left.measurements]
    done = len(runs) - len(left.runs)
    if done or measured:
        has = [_of_runs(done, len(runs))] if runs else []
        shared.say(f"{request.out} has {', '.join([*has, *measured])} already")
    lacks = [_of_runs(len(left.runs), len(runs))] if left.runs else []
    shared.say(f"to do: {', '.join([*lacks, *left.measurements]) or 'nothing'}; scale: {request.scale.description()}")
    return left


def _of_runs(some: int, of: int) -> str:
    return f"{some} of {of} {'run' if of == 1 else 'runs'}"


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
    check_run(job, run.name)
    history = train_all(job, folder, warm_up_all(job), shared.console, on_divergence="the report says so")
    record = history[run.name]
    steps_S = record.steps.durations()
    outcome: dict[str, Any] = {
        "rows": epochs_json(history),
        "diverged": record.diverged,
        "median_step_seconds": steps_S.median().item() if len(steps_S) else None,
    }
    folder.write_json("outcome.json", outcome)
    folder.delete_checkpoint(run.name)
