"""The figures of the study: the rivals by the clock, curves of each problem, and the last loss by learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from studies import stages
from studies.optimizers import NAMES, OURS
from studies.problems import PROBLEMS
from studies.results import TARGETS, Curve, Results, ratio
from studies.runs import SEEDS
from tengrad_triton.files import replacing
from tengrad_triton.recipes.reports.styles import STYLES, log_axis

COLOR = dict(zip(NAMES, STYLES, strict=False))
TITLES = {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}
LEAST, TICKS, NEVER = 0.4, (0.5, 0.7, 1.0, 1.5), 2.2  # of the ratios' axis; NEVER is where no loss was reached
COLUMNS = 4  # of the figure with a panel for each problem


def draw(results: Results, folder: Path) -> None:
    """Write ``defaults-clock.png``, ``defaults-PROBLEM.png`` for each problem, and ``defaults-lr.png``."""
    _save(_by_the_clock(results), folder / "defaults-clock.png")
    for name in results.problems:
        _save(_of_problem(results, name), folder / f"defaults-{name}.png")
    _save(_by_rate(results), folder / "defaults-lr.png")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _by_the_clock(results: Results) -> Figure:
    """Draw the ratio of times to each tuned rival on each problem."""
    rivals = {target.rival: _ratios(results, target.rival) for target in TARGETS}
    names = sorted(results.problems, key=lambda name: rivals["adamw"].get(name) or math.inf, reverse=True)
    figure = Figure(figsize=(7.2, 1 + 0.34 * max(4, len(names))), dpi=140, layout="constrained")
    panel = figure.subplots()
    for shift, (rival, ratios) in zip((0.2, 0.0, -0.2), rivals.items(), strict=True):
        (color, marker), known = COLOR[rival], [name for name in names if name in ratios]
        faces = ["none" if ratios[name] is None else color for name in known]
        points = [ratios[name] or NEVER for name in known], [names.index(name) + shift for name in known]
        panel.scatter(*points, s=42, edgecolors=color, facecolors=faces, marker=marker, zorder=3)
        panel.scatter([], [], s=42, color=color, marker=marker, label=TITLES[rival])
    panel.set(xscale="log", xlim=(LEAST, NEVER * 1.12), ylim=(-0.6, len(names) - 0.4))
    panel.set_xticks([*TICKS, NEVER], [*(f"{tick:g}" for tick in TICKS), "loss not\nreached"])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yticks(range(len(names)), [name + " *" * (PROBLEMS[name].role == "judge") for name in names])
    panel.axvspan(LEAST, 1, color=COLOR[OURS][0], alpha=0.08, linewidth=0)
    panel.axvline(1, color="black", linewidth=1)
    for x, side, text in ((0.98, "right", "TENGraD untouched is ahead"), (1.02, "left", "the tuned rival is ahead")):
        panel.text(x, 1.02, text, ha=side, transform=panel.get_xaxis_transform())
    panel.set_xlabel("TENGraD's time to the rival's last test loss / time of the rival's whole run")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right", title="learning rate tuned\nfor each problem")
    return figure


def _ratios(results: Results, rival: str) -> dict[str, float | None]:
    """Return the ratio of each problem that was measured; None where TENGraD never reached the rival's loss."""
    found = {name: ratio(results.ours(name), results.rival(name, rival)) for name in results.problems}
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    return {name: numbers.get(name) for name, value in found.items() if name in numbers or value == "not reached"}


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
        log_axis(panel)
    for panel in panels[1:]:  # the steps of some rivals cost several times as much as others'
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    for panel in panels:
        panel.grid(alpha=0.3)
    if panels[0].lines:
        panels[1].legend(fontsize="small")
    figure.suptitle(f"{problem.title}: mean of {len(SEEDS)} seeds, and their range", fontsize="medium")
    return figure


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
            log_axis(panel)
        panel.xaxis.set_major_formatter("{x:g}")
    for panel in panels[len(results.problems) :]:
        panel.axis("off")
    figure.supxlabel("learning rate / default", fontsize="medium")
    figure.supylabel("test loss at the end, worst seed", fontsize="medium")
    if results.problems:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(NAMES))
    return figure
