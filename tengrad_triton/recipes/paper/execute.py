"""Does what was asked: the estimate, the runs that are left, the measurements, and the report."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.data.registry import DatasetName, load
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.estimates import Estimate, check_memory, estimated
from tengrad_triton.recipes.paper.measurements.measure import measure
from tengrad_triton.recipes.paper.report import write as report
from tengrad_triton.recipes.paper.request import Asked, expanded
from tengrad_triton.recipes.paper.runs import Run, runs_of
from tengrad_triton.recipes.training.loop import Job, diverged
from tengrad_triton.recipes.training.metrics import rows_json
from tengrad_triton.recipes.training.run import check_installed, train_all, warm_up_all
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

Key = tuple[str, OptimizerName]  # a row's and an optimizer's: runs that take the same time


@dataclass(frozen=True)
class Workshop:
    """What the runs share: the device, and each data set, loaded once."""

    asked: Asked
    console: Console
    device: torch.device
    loaded: dict[tuple[DatasetName, int | None, int | None], Data] = field(default_factory=dict)

    def job(self, settings: Settings) -> Job:
        """Return a run's job, on the device."""
        key = (settings.dataset, settings.train_limit, settings.test_limit)
        if key not in self.loaded:
            self.loaded[key] = load(settings.dataset, settings.data, *key[1:], self.console).to(self.device)
        return Job(settings, self.loaded[key], self.device)


def execute(targets: tuple[str, ...], asked: Asked, command: Sequence[str], console: Console) -> None:
    """Run and measure what is not there yet, and write the report; raises `UsageError` and `InterruptedRunError`."""
    targets = expanded(targets)
    for name in asked.optimizer:
        check_installed(name)
    runs = runs_of(asked, targets)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    shop = Workshop(asked, console, machine.chosen_device(asked.device))
    with _kept(asked):
        left = [run for run in runs if run.outcome(asked.out) is None]
        _show_estimates(left, shop, len(runs))
        if asked.estimate:
            return
        asked.out.mkdir(parents=True, exist_ok=True)
        report.note(asked, targets, command)
        for number, run in enumerate(left, 1):
            console.print(f"run {number} of {len(left)}: {run.row.title}, {run.label}", highlight=False)
            train(run, shop)
        measure(targets, shop.job, asked, console)
        pages = report.write(asked.out)
    console.print(f"report: {', '.join(map(str, pages))}", soft_wrap=True, highlight=False)


@contextmanager
def _kept(asked: Asked) -> Iterator[None]:
    """Say after an interruption or on a full disk that the same command goes on from what is there."""
    advice = f"give the same command again to go on from what {asked.out} has"
    try:
        yield
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted: {advice}") from stop
    except OSError as error:
        raise UsageError(
            f"{asked.out}: cannot be written ({error.strerror or error}): make room, and {advice}"
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "file write failed" not in str(error):
            raise
        raise UsageError(f"{asked.out}: a checkpoint cannot be written: make room, and {advice}") from error


def _show_estimates(left: Sequence[Run], shop: Workshop, total: int) -> None:
    """Measure a run of every kind; raises `UsageError` where one does not fit the memory."""
    estimates: dict[Key, tuple[Estimate, int]] = {}
    for run in left:
        key = (run.row.title, run.name)
        known = estimates.get(key)
        estimate = known[0] if known else estimated(shop.job(run.settings), run.name)
        estimates[key] = (estimate, known[1] + 1 if known else 1)
    said = f"{total} runs, {len(left)} of them to do; scale: {shop.asked.scale.said()}"
    shop.console.print(said, soft_wrap=True, highlight=False)
    if estimates:
        shop.console.print(_table(estimates))


def _table(estimates: dict[Key, tuple[Estimate, int]]) -> Table:
    seconds = sum(estimate.seconds * count for estimate, count in estimates.values())
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=f"estimated from first steps: {duration(seconds)} in all")
    for heading in ("row", "optimizer", "runs", "steps", "a step", "a run"):
        table.add_column(heading, justify="left" if heading in ("row", "optimizer") else "right", no_wrap=True)
    for (row, name), (estimate, count) in estimates.items():
        cells = (f"{count}", f"{estimate.steps}", f"{1e3 * estimate.step:.1f} ms", duration(estimate.seconds))
        table.add_row(row, name, *cells)
    return table


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def train(run: Run, shop: Workshop) -> None:
    """Train from the last whole epoch to the end; keep the numbers, and drop the checkpoint, which can be large."""
    path = run.folder(shop.asked.out)
    folder = RunFolder(path)
    if not (path / "settings.json").exists():
        shutil.rmtree(path, ignore_errors=True)  # a kill may have come before the settings were there
        folder = RunFolder.create(path, run.settings)
    job = shop.job(run.settings)
    check_memory(job, run.name)
    history = train_all(job, folder, warm_up_all(job), shop.console)
    record = history[run.name]
    steps_S = record.steps.durations()
    outcome: dict[str, Any] = {
        "rows": rows_json(history),
        "diverged": diverged(record),
        "median_step_seconds": steps_S.median().item() if len(steps_S) else None,
    }
    folder.write_json("outcome.json", outcome)
    shutil.rmtree(path / "checkpoints")
