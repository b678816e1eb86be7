"""The figures of the study: loss by step and by time, quality by time, and the last loss by learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from studies import stages
from studies.optimizers import NAMES
from studies.problems import PROBLEMS
from studies.results import Curve, Results
from studies.runs import SEEDS
from tengrad_triton.files import replacing
from tengrad_triton.recipes.reports.run_figures import STYLES

COLOR = dict(zip(NAMES, STYLES, strict=False))
COLUMNS = 4  # of the figure with a panel for each problem


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
    problem = PROBLEMS[name]
    figure = Figure(figsize=(13, 3.8), dpi=90, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3)
    for curve in results.curves(name):
        if curve.runs:
            _draw_curve(panels, curve)
    panels[0].set(xlabel="step", ylabel="test loss")
    panels[1].set(xlabel="time of training (s)", ylabel="test loss")
    panels[2].set(xlabel="time of training (s)", ylabel=f"test {problem.quality}")
    for panel in panels[: 2 if problem.is_share else 3]:
        _log(panel)
    for panel in panels:
        panel.grid(alpha=0.3)
    if panels[0].lines:
        panels[1].legend(fontsize="small")
    figure.suptitle(f"{problem.title}: mean of {len(SEEDS)} seeds, and their range", fontsize="medium")
    return figure


def _log(panel: Axes) -> None:
    """Make the vertical axis logarithmic. If it spans less than a decade, label the minor ticks too."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else NullFormatter())


def _draw_curve(panels: Sequence[Axes], curve: Curve) -> None:
    color, marker = COLOR[curve.optimizer]
    steps = [float(step) for step in curve.runs[0].steps]
    axes = (("loss", steps), ("loss", curve.times), ("quality", curve.times))
    for panel, (quantity, x) in zip(panels, axes, strict=True):
        points = list(zip(*(getattr(run, quantity) for run in curve.runs), strict=True))
        means, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
        line = "--" if curve.tuned else "-"
        panel.plot(x, means, label=curve.label, color=color, marker=marker, markersize=4, linestyle=line)
        panel.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)


def _by_rate(results: Results) -> Figure:
    rows = max(1, -(-len(results.problems) // COLUMNS))
    figure = Figure(figsize=(13, 2.8 * rows), dpi=90, layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, COLUMNS).flat)
    for panel, name in zip(panels, results.problems, strict=False):
        for optimizer in NAMES:
            ends = {f: results.ends(name, optimizer, f) for f in stages.grid(name, optimizer, results.store)}
            worst = {factor: max(values) for factor, values in ends.items() if values}
            color, marker = COLOR[optimizer]
            panel.plot(list(worst), list(worst.values()), color=color, marker=marker, markersize=4, label=optimizer)
        panel.set(xscale="log", title=name)
        panel.grid(alpha=0.3, which="both")
        if any(len(line.get_xdata()) for line in panel.lines):  # type: ignore[arg-type]
            _log(panel)
    for panel in panels[len(results.problems) :]:
        panel.axis("off")
    figure.supxlabel("learning rate / default", fontsize="medium")
    figure.supylabel("test loss at the end, worst seed", fontsize="medium")
    if results.problems:
        panels[0].legend(fontsize="small")
    return figure
