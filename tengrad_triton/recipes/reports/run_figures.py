"""Figures of a run: loss and accuracy of all optimizers by epoch, by step and by time.

Key: S steps.
"""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

from tengrad_triton.files import replacing
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.reports.styles import log_axis, style_of
from tengrad_triton.recipes.training.metrics import History, Record

SOFTWARE = "tengrad-triton"
MARK = f"Software\0{SOFTWARE}".encode()  # in the first bytes of a figure: what has it may be replaced
FIGURES = ("loss", "accuracy", "steps")
QUANTITIES = (("loss", "mean cross-entropy (nats)", 1), ("accuracy", "accuracy (%)", 100))
MARKERS = 12  # on each curve, whatever its number of points
WINDOW = 25  # steps of a running mean: batches differ more than optimizers


def draw(history: History, title: str, folder: Path, prefix: str) -> None:
    """Write a PNG file for each of `figures_of` the history; its name starts with ``prefix``."""
    by_epoch = {quantity[0]: partial(_by_epoch, history, *quantity) for quantity in QUANTITIES}
    for name in figures_of(history):
        figure = by_epoch[name]() if name in by_epoch else _by_step(history)
        figure.suptitle(title)
        with replacing(folder / f"{prefix}{name}.png") as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})


def figures_of(history: History) -> tuple[str, ...]:
    """Return the names of the figures that show something: one epoch makes no curve by epoch."""
    return FIGURES if any(len(record.epochs) > 1 for record in history.values()) else FIGURES[-1:]


def running_mean(values_S: Tensor, window: int) -> Tensor:
    """Return the mean of the last ``window`` values at each step, of fewer at the start: [S]."""
    counts_S = torch.arange(1, len(values_S) + 1).clamp(max=window)
    return pad(values_S, (window - 1, 0)).unfold(0, window, 1).sum(1) / counts_S


def _by_epoch(history: History, quantity: str, label: str, scale: int) -> Figure:
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    panels: tuple[Axes, Axes] = figure.subplots(1, 2, sharey=True)
    by_epoch, by_time = panels
    for color, marker, name, record in _styled(history):
        epochs = [epoch.epoch for epoch in record.epochs]
        seconds = list(accumulate(epoch.train_seconds for epoch in record.epochs))
        for part, line in (("test", "-"), ("train", "--")):
            values = [scale * getattr(epoch, f"{part}_{quantity}") for epoch in record.epochs]
            for panel, x in ((by_epoch, epochs), (by_time, seconds)):
                panel.plot(
                    x,
                    values,
                    line,
                    color=color,
                    marker=marker if part == "test" or len(epochs) == 1 else None,  # one point makes no line
                    markerfacecolor=None if part == "test" else "none",
                    markevery=max(1, len(values) // MARKERS),
                    markersize=5,
                    alpha=1 if part == "test" else 0.6,
                    label=f"{name}, {part}",
                )
    by_epoch.set(xlabel="epoch", ylabel=label)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    by_time.set(xlabel="training time (s)")
    _finish(panels, quantity)
    by_epoch.set_xlim(0.5, max((len(record.epochs) for record in history.values()), default=1) + 0.5)
    by_time.set_xlim(left=0)
    by_time.legend(fontsize="small")
    return figure


def _by_step(history: History) -> Figure:
    figure = Figure(figsize=(11, 8), dpi=150, layout="constrained")
    grid: list[tuple[Axes, Axes]] = list(figure.subplots(2, 2, sharex="col", sharey="row"))
    for panels, (quantity, label, scale) in zip(grid, QUANTITIES, strict=True):
        for color, marker, name, record in _styled(history):
            means = (scale * running_mean(getattr(record.steps, quantity), WINDOW)).tolist()
            every = max(1, len(means) // MARKERS)
            for panel, x in zip(panels, (range(len(means)), record.steps.train_seconds.tolist()), strict=True):
                panel.plot(x, means, color=color, marker=marker, markevery=every, markersize=5, label=name)
        panels[0].set(ylabel=f"training {label.removeprefix('mean ')},\nmean of the last {WINDOW} steps")
        _finish(panels, quantity)
    grid[1][0].set(xlabel="step")
    grid[1][1].set(xlabel="training time (s)")
    grid[0][1].legend(fontsize="small", loc="upper right")  # to search for the best place is slow with many steps
    return figure


def _styled(history: History) -> Iterator[tuple[str, str, OptimizerName, Record]]:
    for name, record in history.items():
        yield *style_of(name), name, record


def _finish(panels: tuple[Axes, Axes], quantity: str) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
        if quantity == "loss":
            log_axis(panel)
