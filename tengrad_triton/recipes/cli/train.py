"""`tengrad-triton train`: a new run or a resumed one, with its figures and a table at the end."""

import shlex
from datetime import datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tengrad_triton.files import reason
from tengrad_triton.recipes.errors import InterruptedRunError, UsageError
from tengrad_triton.recipes.reports.comparison import OUTCOME, outcomes
from tengrad_triton.recipes.reports.run_figures import draw
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.run import WarmUps, job_of, train_all, warm_up_all
from tengrad_triton.recipes.training.run_folder import RunFolder, check_free
from tengrad_triton.recipes.training.settings import Settings


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
    except KeyboardInterrupt as stop:
        raise InterruptedRunError(f"interrupted: go on with `{command}`") from stop
    except OSError as error:
        raise UsageError(
            f"{error.filename or run.path}: cannot be written ({reason(error)}): make room, and go on with `{command}`"
        ) from error
    console.print(_outcome_table(history))


def _outcome_table(history: History) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="Times are those of training, after a warm-up; that of an epoch is the median.",
    )
    for heading in OUTCOME:
        table.add_column(heading, justify="left" if heading == OUTCOME[0] else "right", no_wrap=True)
    for cells in outcomes(history):
        table.add_row(*cells)
    return table
