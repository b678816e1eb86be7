"""The figures of the study: loss and quality by step and by time, and the last loss by learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from studies.optimizers import BUILDERS, FACTORS
from studies.problems import PROBLEMS
from studies.results import Curve, Results
from studies.runs import SEEDS
from tengrad_triton.recipes.files import replacing
from tengrad_triton.recipes.reports.run_figures import STYLES

RATES = sorted({factor for factors in FACTORS.values() for factor in factors})
COLOR = dict(zip(BUILDERS, STYLES, strict=False))


def draw(results: Results, folder: Path) -> None:
    """Write ``defaults-PROBLEM.png`` for each problem, and ``defaults-lr.png``, into a folder."""
    for name in results.problems:
        _save(_of_problem(results, name), folder / f"defaults-{name}.png")
    _save(_by_rate(results), folder / "defaults-lr.png")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _of_problem(results: Results, name: str) -> Figure:
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    grid: Sequence[Sequence[Axes]] = figure.subplots(2, 2, sharex="col", sharey="row")
    for curve in results.curves(name):
        color, marker = COLOR[curve.optimizer]
        style = {"color": color, "marker": marker, "markersize": 4, "linestyle": "--" if curve.tuned else "-"}
        for panels, quantity in zip(grid, ("loss", "quality"), strict=True):
            _draw_curve(panels, curve, quantity, style)
    quality = results.quality(name)
    grid[0][0].set(ylabel="test loss")
    _log(grid[0][0])
    grid[1][0].set(ylabel=quality)
    if quality == "error":
        _log(grid[1][0])
    grid[1][0].set(xlabel="step")
    grid[1][1].set(xlabel="time of training (s)")
    for panel in (panel for panels in grid for panel in panels):
        panel.grid(alpha=0.3)
    grid[0][1].legend(fontsize="small")
    figure.suptitle(f"{PROBLEMS[name].title}: mean of {len(SEEDS)} seeds, and their range")
    return figure


def _log(panel: Axes) -> None:
    """Make the vertical axis logarithmic. If it spans less than a decade, label the minor ticks too."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else NullFormatter())


def _draw_curve(panels: Sequence[Axes], curve: Curve, quantity: str, style: dict[str, object]) -> None:
    seeds = [getattr(run, quantity) for run in curve.runs]
    points = list(zip(*seeds, strict=False))
    means, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
    for panel, x in zip(panels, (curve.runs[0].steps, curve.times), strict=True):
        panel.plot(x[: len(points)], means, label=curve.label, **style)
        panel.fill_between(x[: len(points)], low, high, color=style["color"], alpha=0.1, linewidth=0)


def _by_rate(results: Results) -> Figure:
    figure = Figure(figsize=(11, 6.5), dpi=110, layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for panel, name in zip(panels, results.problems, strict=False):
        for optimizer in results.optimizers(name):
            ends = {factor: results.ends(name, optimizer, factor) for factor in FACTORS[optimizer]}
            found = {factor: values for factor, values in ends.items() if values}
            color, marker = COLOR[optimizer]
            worst = [max(values) for values in found.values()]
            panel.plot(list(found), worst, color=color, marker=marker, label=optimizer)
        panel.set(xscale="log", title=name, xlabel="learning rate / default", ylabel="test loss at the end")
        panel.set_xticks(RATES, [f"{rate:.2g}" for rate in RATES])
        panel.xaxis.set_minor_formatter(NullFormatter())
        _log(panel)
        panel.grid(alpha=0.3, which="both")
    for panel in panels[len(results.problems) :]:
        panel.axis("off")
    panels[0].legend(fontsize="small")
    return figure
