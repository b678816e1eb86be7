"""The figures of the study: the error of each optimizer against CPU time, for each problem."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.pinn.page import Line, Results
from studies.pinn.problems import PROBLEMS
from studies.pinn.registry import FAMILIES
from studies.pinn.runs import schedule
from tengrad_triton.files import replacing
from tengrad_triton.recipes.reports.styles import COLORS, style_at

EVERY = 3  # points from one marker to the next


def draw(results: Results, folder: Path) -> None:
    """Write ``pinn-PROBLEM.png`` for each problem."""
    for name in results.problems:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"pinn-{name}.png") as temporary:
            of_problem(results, name).savefig(temporary, format="png", metadata={"Software": None})


def of_problem(results: Results, name: str) -> Figure:
    """Draw the median over the seeds of each optimizer's error, and its range."""
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    panel = figure.subplots()
    for line in results.lines(name):
        _curve(panel, line, schedule(results.seconds(name)))
    panel.set(xscale="log", yscale="log", xlabel="CPU time of the steps (s)", ylabel=PROBLEMS[name].measured)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panel.set_title(PROBLEMS[name].title, fontsize="medium")
    return figure


def _curve(panel: Axes, line: Line, times: list[float]) -> None:
    place = list(FAMILIES).index(line.family)
    color, marker = style_at(place)
    dashes = "-" if place < len(COLORS) else "--"  # where colours come again
    first = min((run.points[1].seconds for run in line.runs if len(run.points) > 1), default=math.inf)
    shown = [at for at in times if at >= 0.9 * first]
    errors = [line.errors_at(at) for at in shown]
    style: dict[str, Any] = {
        "color": color, "marker": marker, "markersize": 4, "markevery": EVERY, "linestyle": dashes,
    }  # fmt: skip
    panel.plot(shown, [statistics.median(of_seeds) for of_seeds in errors], label=line.name, **style)
    finite = [(at, of_seeds) for at, of_seeds in zip(shown, errors, strict=True) if math.isfinite(max(of_seeds))]
    low, high = ([f(of_seeds) for _, of_seeds in finite] for f in (min, max))
    panel.fill_between([at for at, _ in finite], low, high, color=color, alpha=0.12, linewidth=0)
