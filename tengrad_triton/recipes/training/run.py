"""A whole run: its data are loaded, every optimizer warms up, and then each trains into the run's folder."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from rich.console import Console

from tengrad_triton.recipes.data.registry import load
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring import machine
from tengrad_triton.recipes.optimizers import third_party
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS, flag
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.checkpoint import record_of
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.loop import fit
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.progress import Progress
from tengrad_triton.recipes.training.run_folder import RunFolder, add_events
from tengrad_triton.recipes.training.settings import Settings, is_installed
from tengrad_triton.recipes.training.warm_up import WarmUp, warm_up

WarmUps = dict[OptimizerName, WarmUp]


def job_of(settings: Settings, console: Console) -> Job:
    """Return the job of a run with its data loaded, and set torch's number of threads.

    Raises `UsageError` if the data cannot be read or the device does not exist.
    """
    device = machine.chosen_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = load(settings.dataset, settings.data, settings.train_limit, settings.test_limit, console)
    return Job(settings, data.to(device), device)


def warm_up_all(job: Job) -> WarmUps:
    """Return the warm-up of each optimizer.

    Raises `UsageError` if an optimizer is not installed, rejects a setting or runs out of memory.
    """
    done: WarmUps = {}
    for name in job.settings.optimizer:
        check_installed(name)
        with refusing(name):
            done[name] = warm_up(job, name)
    return done


@contextmanager
def refusing(name: OptimizerName) -> Iterator[None]:
    """Turn a rejected setting of an optimizer, and a lack of memory, into a `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{name}: {error}: see the {flag(name)} flags") from error
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{name}: {error}: lower --batch-size or --width") from error


def check_installed(name: OptimizerName) -> None:
    """Raise `UsageError` if the package of an optimizer is not installed."""
    package = OPTIMIZERS[name].package
    if not is_installed(package):
        advice = "pip install 'tengrad-triton[rivals]'" if package == third_party.PACKAGE else "leave it out"
        raise UsageError(f"{name} needs the package {package}, which is not installed: {advice}")


def train_all(
    job: Job, run: RunFolder, warm_ups: WarmUps, console: Console, on_divergence: str | None = None
) -> History:
    """Train every optimizer from its last checkpoint to its end; return the metrics of all.

    A line says that an optimizer diverged, and ``on_divergence``; the flag of its learning rate if that is None.

    Raises `UsageError` if a checkpoint does not fit the settings, or if another process trains into the folder.
    """
    with run.locked():
        return _train_each(job, run, warm_ups, console, on_divergence)


def _train_each(job: Job, run: RunFolder, warm_ups: WarmUps, console: Console, on_divergence: str | None) -> History:
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
        if history[name].diverged:
            advice = on_divergence or f"lower {flag(name)}.lr"
            line = f"{name} diverged in epoch {len(history[name].epochs)}: {advice}"
            console.print(line, style="bold red", soft_wrap=True)
    run.write_metrics(history)
    return history


def _train_one(job: Job, name: OptimizerName, run: RunFolder, history: History, console: Console) -> None:
    epochs, label = job.settings.epochs, name.ljust(max(map(len, job.settings.optimizer)))
    with (
        closing(run.events(name, history[name])) as events,
        Progress.of(console, label, epochs, len(job.data.train)) as progress,
    ):
        for state in fit(job, name, run.load_checkpoint(name), progress.step):
            run.save_checkpoint(name, state)
            history[name] = record_of(state)
            run.write_metrics(history)
            add_events(events, history[name], since=len(history[name].epochs) - 1)
            progress.epoch(history[name].epochs[-1])
