"""A run from its data to its figures: every optimizer in turn, an epoch at a time into the run folder."""

import shlex
from contextlib import closing
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from tengrad_triton.recipes.data.registry import load
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.optimizers.baselines import PACKAGE
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.reports.run_figures import draw
from tengrad_triton.recipes.training.loop import Job, WarmUp, diverged, fit, record_of, warm_up
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.progress import Display, summary_table
from tengrad_triton.recipes.training.run_folder import RunFolder, add_events, check_free
from tengrad_triton.recipes.training.settings import Settings, is_installed

WarmUps = dict[OptimizerName, WarmUp]


def start(settings: Settings, out: Path | None, console: Console) -> None:
    """Train into a new folder, which is made only once data, model and optimizers are known to fit together."""
    path = out or Path("runs") / f"{settings.dataset}-{settings.model}-{datetime.now():%Y%m%d-%H%M%S}"
    check_free(path)
    job = job_of(settings, console)
    warm_ups = warm_up_all(job)
    _train_and_show(job, RunFolder.create(path, settings), warm_ups, console)


def resume(settings: Settings, run: RunFolder, console: Console) -> None:
    """Train on from the last whole epoch in a folder."""
    job = job_of(settings, console)
    _train_and_show(job, run, warm_up_all(job), console)


def job_of(settings: Settings, console: Console) -> Job:
    """Return what a run's optimizers share, with its data loaded."""
    device = machine.chosen_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = load(settings.dataset, settings.data, settings.train_limit, settings.test_limit, console)
    return Job(settings, data.to(device), device)


def warm_up_all(job: Job) -> WarmUps:
    """Return each optimizer's warm-up; raises `UsageError` if one is not installed or cannot take its settings."""
    done: WarmUps = {}
    for name in job.settings.optimizer:
        check_installed(name)
        try:
            done[name] = warm_up(job, name)
        except ValueError as error:
            raise UsageError(f"{name}: {error}: see the --{name} flags") from error
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{name}: {error}: lower --batch-size or --width") from error
    return done


def check_installed(name: OptimizerName) -> None:
    """Raise `UsageError` if the package that an optimizer comes from is not there."""
    package = Settings().of(name).needs
    if not is_installed(package):
        advice = "pip install 'tengrad-triton[rivals]'" if package == PACKAGE else "leave it out"
        raise UsageError(f"{name} needs the package {package}, which is not installed: {advice}")


def _train_and_show(job: Job, run: RunFolder, warm_ups: WarmUps, console: Console) -> None:
    title = job.settings.title(len(job.data.train))
    console.print(f"{title}: {run.path}", soft_wrap=True, highlight=False)
    try:
        history = train_all(job, run, warm_ups, console)
    except KeyboardInterrupt as stop:
        command = f"tengrad-triton train --resume {shlex.quote(str(run.path))}"
        raise InterruptedRunError(f"interrupted: go on with `{command}`") from stop
    draw(history, title, run.path, "")
    console.print(summary_table(history))


def train_all(job: Job, run: RunFolder, warm_ups: WarmUps, console: Console) -> History:
    """Train every optimizer from its last checkpoint to its end; return what all of them measured."""
    settings = job.settings
    history: History = {name: record_of(run.load_checkpoint(name)) for name in settings.optimizer}
    seconds = {name: warm.seconds for name, warm in warm_ups.items()}
    run.add_session(
        machine.describe(job.device)
        | {"train_images": len(job.data.train), "test_images": len(job.data.test), "warm_up_seconds": seconds}
    )
    for name, warm in warm_ups.items():
        if warm.summary is not None:
            run.write_text(f"{name}-summary.txt", warm.summary)
    for name in settings.optimizer:
        _train_one(job, name, run, history, console)
    run.write_metrics(history)
    return history


def _train_one(job: Job, name: OptimizerName, run: RunFolder, history: History, console: Console) -> None:
    epochs = job.settings.epochs
    with (
        closing(run.events(name, history[name])) as events,
        Display.of(console, name, epochs, len(job.data.train)) as display,
    ):
        for state in fit(job, name, run.load_checkpoint(name), display.step):
            run.save_checkpoint(name, state)
            history[name] = record_of(state)
            run.write_metrics(history)
            add_events(events, history[name], since=len(history[name].rows) - 1)
            display.epoch(history[name].rows[-1])
    if diverged(history[name]):
        console.print(f"{name} diverged in epoch {len(history[name].rows)}: lower --{name}.lr", style="bold red")
