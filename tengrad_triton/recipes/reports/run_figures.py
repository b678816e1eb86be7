"""Figures of a run: loss and accuracy of all optimizers by epoch, by step and by time.

Key: S steps.
"""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from torch import Tensor
from torch.nn.functional import pad

from tengrad_triton.recipes.files import replacing
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import History, Record

FIGURES = ("loss", "accuracy", "steps")
QUANTITIES = (("loss", "mean cross-entropy (nats)", 1), ("accuracy", "accuracy (%)", 100))
# Okabe and Ito's colours can be told apart with any colour vision; the markers help in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "x"))
MARKERS = 12  # on each curve, whatever its number of points
WINDOW = 25  # steps of a running mean: batches differ more than optimizers


def draw(history: History, title: str, folder: Path, prefix: str) -> None:
    """Write a PNG file for each of `figures_of` the history; its name starts with ``prefix``."""
    by_epoch = {quantity[0]: partial(_by_epoch, history, *quantity) for quantity in QUANTITIES}
    for name in figures_of(history):
        figure = by_epoch[name]() if name in by_epoch else _by_step(history)
        figure.suptitle(title)
        with replacing(folder / f"{prefix}{name}.png") as temporary:
            figure.savefig(temporary, format="png")


def figures_of(history: History) -> tuple[str, ...]:
    """Return the names of the figures that show something: one epoch makes no curve by epoch."""
    return FIGURES if any(len(record.epochs) > 1 for record in history.values()) else FIGURES[-1:]


def log_axis(panel: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers; with few decades, also numbers between them."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high < 10 * low:
        panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
        panel.yaxis.set_minor_locator(NullLocator())
    elif high < 200 * low:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


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
    for (color, marker), (name, record) in zip(cycle(STYLES), history.items(), strict=False):
        yield color, marker, name, record


def _finish(panels: tuple[Axes, Axes], quantity: str) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
        if quantity == "loss":
            log_axis(panel)
