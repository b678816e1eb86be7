"""What a run shows on the terminal: a progress bar or, without one, a line an epoch; and a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from tengrad_triton.recipes.run import History, Row
from tengrad_triton.recipes.train import Watch

REDRAW_SECONDS = 0.25  # reading the loss makes a GPU wait, so it is read no more often than an eye can follow


@contextmanager
def progress_bar(console: Console, name: str, epochs: int, images: int) -> Iterator[Watch]:
    """Give a function that moves a bar over all epochs of one optimizer, with the running loss and accuracy."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[quality]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name:8}", total=epochs * images, quality="")
        drawn = 0.0

        def watch(epoch: int, totals_3: Tensor) -> None:
            nonlocal drawn
            if progress.disable or time.monotonic() - drawn < REDRAW_SECONDS:
                return
            loss, hits, seen = totals_3.tolist()
            quality = f"epoch {epoch}/{epochs}  loss {loss / seen:.3f}  {hits / seen:.1%}"
            progress.update(task, completed=(epoch - 1) * images + seen, quality=quality)
            drawn = time.monotonic()

        yield watch


def epoch_line(row: Row, epochs: int) -> str:
    """Return what one epoch came to."""
    return (
        f"{row.optimizer:8} epoch {row.epoch}/{epochs}  train loss {row.train_loss:.4f}, accuracy "
        f"{row.train_accuracy:.2%}  test loss {row.test_loss:.4f}, accuracy {row.test_accuracy:.2%}  "
        f"{row.train_seconds:.2f} s"
    )


def summary_table(history: History) -> Table:
    """Return a row an optimizer; an epoch's time is the median, because other programs disturb single ones."""
    table = Table(caption="Times are those of training, after a warm-up; an epoch's is the median.")
    table.add_column("optimizer")
    for heading in ("test acc.", "best (epoch)", "train loss", "time", "an epoch", "× SGD"):
        table.add_column(heading, justify="right", no_wrap=True)
    epoch_seconds = {name: median(row.train_seconds for row in rows) for name, rows in history.items() if rows}
    for name, seconds in epoch_seconds.items():
        rows = history[name]
        best = max(rows, key=lambda row: row.test_accuracy)
        ratio = f"{seconds / epoch_seconds['sgd']:.2f}" if "sgd" in epoch_seconds else "-"
        table.add_row(
            name,
            f"{rows[-1].test_accuracy:.2%}",
            f"{best.test_accuracy:.2%} ({best.epoch})",
            f"{rows[-1].train_loss:.4f}",
            f"{sum(row.train_seconds for row in rows):.1f} s",
            f"{seconds:.2f} s",
            ratio,
        )
    return table
