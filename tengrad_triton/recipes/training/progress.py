"""The progress of training on the terminal: a bar or, where the output is not a terminal, a line for each epoch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich import progress
from rich.console import Console
from rich.table import Column
from torch import Tensor

from tengrad_triton.recipes.terminal import can_redraw
from tengrad_triton.recipes.training.metrics import EpochMetrics

REDRAW_SECONDS = 0.25  # reading the loss makes a GPU wait: it is read no more often than an eye can follow


class Progress:
    """The progress of one optimizer over all its epochs."""

    def __init__(self, bar: progress.Progress, label: str, epochs: int, images: int) -> None:
        self._bar, self._label, self._epochs, self._images = bar, label, epochs, images
        self._task = bar.add_task(label, total=epochs * images, quality="")
        self._drawn = time.monotonic()

    @classmethod
    @contextmanager
    def of(cls, console: Console, label: str, epochs: int, images: int) -> Iterator[Self]:
        """Show the bar while the block runs. ``images`` is the number of images in an epoch."""
        columns = _columns(console.width - len(label) - len(_quality(epochs, epochs, 10.0, 1.0)))
        with progress.Progress(*columns, console=console, disable=not can_redraw(console)) as bar:
            yield cls(bar, label, epochs, images)

    def step(self, epoch: int, totals_3: Tensor) -> None:
        """Move the bar after a step. The arguments are those of `loop.Watch`."""
        if self._bar.disable or time.monotonic() - self._drawn < REDRAW_SECONDS:
            return
        loss, hits, images = totals_3.tolist()
        self._draw(epoch, int(images), loss / images, hits / images)
        self._drawn = time.monotonic()

    def epoch(self, metrics: EpochMetrics) -> None:
        """Show the metrics of an epoch: those of training on the bar, or all of them in a line."""
        if self._bar.disable:
            line = (
                f"{metrics.optimizer:8} epoch {metrics.epoch}/{self._epochs}  "
                f"train loss {metrics.train_loss:.4f}, accuracy {metrics.train_accuracy:.2%}  "
                f"test loss {metrics.test_loss:.4f}, accuracy {metrics.test_accuracy:.2%}  "
                f"{metrics.train_seconds:.2f} s"
            )
            self._bar.console.print(line, soft_wrap=True, markup=False, highlight=False)
        self._draw(metrics.epoch, self._images, metrics.train_loss, metrics.train_accuracy)

    def _draw(self, epoch: int, images: int, loss: float, accuracy: float) -> None:
        quality = _quality(epoch, self._epochs, loss, accuracy)
        self._bar.update(self._task, completed=(epoch - 1) * self._images + images, quality=quality)


def _quality(epoch: int, epochs: int, loss: float, accuracy: float) -> str:
    return f"epoch {epoch}/{epochs}  loss {loss:.3f}  {accuracy:.1%}"


def _columns(room: int) -> list[progress.ProgressColumn]:
    """Return the columns of the bar; ``room`` is what name and quality leave of the terminal's width.

    The times take 8 characters each with their gap. On a narrow terminal what tells least is left out.
    """
    name, quality = (
        progress.TextColumn(text, markup=False, table_column=Column(overflow="fold"))
        for text in ("{task.description}", "{task.fields[quality]}")
    )
    times: list[progress.ProgressColumn] = [progress.TimeElapsedColumn(), progress.TimeRemainingColumn()]
    shown = times[: max(0, room - 1) // 8]
    length = min(20, room - 2 - 8 * len(shown))
    return [name, *([progress.BarColumn(length)] if length >= 5 else []), quality, *shown]
