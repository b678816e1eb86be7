"""Loss and accuracy of all optimizers of a run, by epoch and by time."""

from itertools import accumulate, cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tengrad_triton.recipes.run import History, replacing

# Okabe and Ito's colours, which readers with any colour vision tell apart; the markers help in print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "x"))
MARKERS = 12  # a curve, whatever its number of epochs


def draw(history: History, title: str, folder: Path) -> None:
    """Write loss.png and accuracy.png."""
    for quantity, label, scale in (("loss", "mean cross-entropy (nats)", 1), ("accuracy", "accuracy (%)", 100)):
        figure = _figure(history, quantity, label, scale)
        figure.suptitle(title)
        with replacing(folder / f"{quantity}.png") as temporary:
            figure.savefig(temporary, format="png")


def _figure(history: History, quantity: str, label: str, scale: int) -> Figure:
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    panels: tuple[Axes, Axes] = figure.subplots(1, 2, sharey=True)
    by_epoch, by_time = panels
    for (color, marker), (name, rows) in zip(cycle(STYLES), history.items(), strict=False):
        epochs = [row.epoch for row in rows]
        seconds = list(accumulate(row.train_seconds for row in rows))
        for part, line in (("test", "-"), ("train", "--")):
            values = [scale * getattr(row, f"{part}_{quantity}") for row in rows]
            for panel, x in ((by_epoch, epochs), (by_time, seconds)):
                panel.plot(
                    x,
                    values,
                    line,
                    color=color,
                    marker=marker if part == "test" else None,
                    markevery=max(1, len(rows) // MARKERS),
                    markersize=5,
                    alpha=1 if part == "test" else 0.6,
                    label=f"{name}, {part}",
                )
    by_epoch.set(xlabel="epoch", ylabel=label)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set(xlabel="training time (s)")
    for panel in panels:
        panel.grid(alpha=0.3)
        if quantity == "loss":
            panel.set_yscale("log")
    by_time.legend(fontsize="small")
    return figure
