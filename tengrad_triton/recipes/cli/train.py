"""`tengrad-triton train`: a new run or a resumed one, with its figures and a table at the end."""

import shlex
from datetime import datetime
from pathlib import Path

from rich.console import Console

from tengrad_triton.files import reason
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.reports.comparison import OUTCOME, outcomes
from tengrad_triton.recipes.reports.run_figures import draw
from tengrad_triton.recipes.terminal import FittedTable
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.run import WarmUps, job_of, train_all, warm_up_all
from tengrad_triton.recipes.training.run_folder import RunFolder, check_free
from tengrad_triton.recipes.training.settings import Settings
from tengrad_triton.tables import Column


def start(settings: Settings, out: Path | None, console: Console) -> None:
    """Train into a new folder, which is made only after every optimizer has taken its first steps.

    Raises `UsageError` if the settings do not fit together, and `InterruptedRunError` on Ctrl-C during training.
    """
    path = out or Path("runs") / f"{settings.dataset}-{settings.model}-{datetime.now():%Y%m%d-%H%M%S}"
    check_free(path)
    job = job_of(settings, console)
    warm_ups = warm_up_all(job)
    _train_and_show(job, RunFolder.create(path, settings), warm_ups, console)


def resume(settings: Settings, run: RunFolder, console: Console) -> None:
    """Resume a run after its last whole epoch; raises as `start` does."""
    run.check_writable()
    if (run.path / "outcome.json").exists():
        raise UsageError(f"{run.path}: a run of tengrad-triton paper, which has ended: read its metrics.json")
    job = job_of(settings, console)
    _train_and_show(job, run, warm_up_all(job), console)


def _train_and_show(job: Job, run: RunFolder, warm_ups: WarmUps, console: Console) -> None:
    title = job.settings.title(len(job.data.train))
    console.print(f"{title}: {run.path}", soft_wrap=True, highlight=False)
    command = f"tengrad-triton train --resume {shlex.quote(str(run.path))}"
    try:
        history = train_all(job, run, warm_ups, console)
        draw(history, title, run.path, "")
    except (KeyboardInterrupt, SystemExit) as stop:  # rich exits when a pipe has no reader any more
        raise InterruptedRunError(f"interrupted: go on with `{command}`") from stop
    except OSError as error:
        raise UsageError(
            f"{error.filename or run.path}: cannot be written ({reason(error)}): make room, and go on with `{command}`"
        ) from error
    console.print(outcome_table(history))


def outcome_table(history: History) -> FittedTable:
    """Return a line for each optimizer: its accuracies, loss and times."""
    columns = [Column(heading, right=heading != OUTCOME[0]) for heading in OUTCOME]
    caption = "Times are those of training, after a warm-up; that of an epoch is the median."
    return FittedTable(columns, outcomes(history), caption)
