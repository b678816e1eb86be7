"""What a run shows on the terminal: a progress bar or, without one, a line an epoch; and a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from tengrad_triton.recipes.reports.comparison import OUTCOME, outcomes
from tengrad_triton.recipes.training.metrics import History, Row

REDRAW_SECONDS = 0.25  # reading the loss makes a GPU wait, so it is read no more often than an eye can follow


class Display:
    """The progress of one optimizer: a bar over all its epochs on a terminal, a line an epoch elsewhere."""

    def __init__(self, progress: Progress, name: str, epochs: int, images: int) -> None:
        self._progress, self._epochs, self._images = progress, epochs, images
        self._task = progress.add_task(f"{name:8}", total=epochs * images, quality="")
        self._drawn = time.monotonic()

    @classmethod
    @contextmanager
    def of(cls, console: Console, name: str, epochs: int, images: int) -> Iterator[Self]:
        """Show the bar for as long as the block lasts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[quality]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield cls(progress, name, epochs, images)

    def step(self, epoch: int, totals_3: Tensor) -> None:
        """Move the bar; takes what `train.Watch` is given."""
        if self._progress.disable or time.monotonic() - self._drawn < REDRAW_SECONDS:
            return
        loss, hits, seen = totals_3.tolist()
        self._draw(epoch, int(seen), loss / seen, hits / seen)
        self._drawn = time.monotonic()

    def epoch(self, row: Row) -> None:
        """Show what an epoch came to: the training's loss and accuracy on the bar, and those of the test in a line."""
        if self._progress.disable:
            line = (
                f"{row.optimizer:8} epoch {row.epoch}/{self._epochs}  "
                f"train loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.2%}  "
                f"test loss {row.test_loss:.4f}, accuracy {row.test_accuracy:.2%}  {row.train_seconds:.2f} s"
            )
            self._progress.console.print(line, soft_wrap=True)
        self._draw(row.epoch, self._images, row.train_loss, row.train_accuracy)

    def _draw(self, epoch: int, seen: int, loss: float, accuracy: float) -> None:
        quality = f"epoch {epoch}/{self._epochs}  loss {loss:.3f}  {accuracy:.1%}"
        self._progress.update(self._task, completed=(epoch - 1) * self._images + seen, quality=quality)


def summary_table(history: History) -> Table:
    """Return a row an optimizer: what `comparison.outcomes` says."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="Times are those of training, after a warm-up; an epoch's is the median.",
    )
    for heading in OUTCOME:
        table.add_column(heading, justify="left" if heading == OUTCOME[0] else "right", no_wrap=True)
    for cells in outcomes(history):
        table.add_row(*cells)
    return table
