"""The figures of the study: the last loss by learning rate, and what a trust region leaves of a schedule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from studies.problems import PROBLEMS as ALL
from studies.tuning.grid import PROBLEMS, REGIONS, SCHEDULES
from studies.tuning.page import CONSTANT, Results
from studies.tuning.runs import LAST, RATES
from tengrad_triton.files import replacing

Line = tuple[str, tuple[float, ...], str, str]
RATE_LINES: dict[str, Line] = {
    "constant": (f"{CONSTANT}tengrad", (1 / 3, 1.0, 3.0), "C7", "o"),
    "falls to zero on a line": ("tengrad: linear", (0.33, 1.0, 3.0, 10.0), "C0", "s"),
}
"""Label: the names of the runs, the multiples of the default rate, color and marker."""


def draw(results: Results, folder: Path) -> None:
    """Write ``tuning-rate.png`` and ``tuning-region.png`` into a folder."""
    _save(_by_rate(results), folder / "tuning-rate.png")
    _save(_by_region(results), folder / "tuning-region.png")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _panels(title: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(12, 3.6), dpi=90, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(PROBLEMS))
    for panel, problem in zip(panels, PROBLEMS, strict=True):
        panel.set_title(f"{problem}: {ALL[problem].title}", fontsize="small")
        panel.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    return figure, panels


def _by_rate(results: Results) -> Figure:
    figure, panels = _panels("Test loss at the end: each seed a mark, and their mean")
    for panel, problem in zip(panels, PROBLEMS, strict=True):
        for label, line in RATE_LINES.items():
            _draw_rates(panel, results, problem, f"TENGraD, {label}", line)
        best = min(("adamw: linear 3", "adamw: linear 10"), key=lambda key: results.lowest(key, problem))
        for key, label, style in ((f"{CONSTANT}adamw tuned", "constant", ":"), (best, "falls", "--")):
            values = _numbers(results, key, problem)
            if values:
                panel.axhline(statistics.mean(values), color="C1", linestyle=style, label=f"AdamW, best rate, {label}")
        panel.set(xscale="log", yscale="log", xlabel="learning rate of TENGraD")
        panel.xaxis.set_major_locator(FixedLocator([0.0033, 0.01, 0.03, 0.1]))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter("{x:g}")
        low, high = panel.get_ylim()
        panel.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else NullFormatter())
    panels[0].set_ylabel("test loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _draw_rates(panel: Axes, results: Results, problem: str, label: str, line: Line) -> None:
    name, factors, color, marker = line
    ends = {RATES["tengrad"] * factor: _numbers(results, f"{name} {factor:.3g}", problem) for factor in factors}
    points = [(rate, value) for rate, values in ends.items() for value in values]
    means = {rate: statistics.mean(values) for rate, values in ends.items() if values}
    panel.plot(list(means), list(means.values()), color=color, marker="_", label=label)
    panel.plot([rate for rate, _ in points], [value for _, value in points], color=color, marker=marker, linestyle="")


def _numbers(results: Results, key: str, problem: str) -> list[float]:
    return [value for value in results.ends(key, problem).values() if isinstance(value, float)]


def _by_region(results: Results) -> Figure:
    figure, panels = _panels("TENGraD.unscaled: what schedule and trust region together multiply a step by, first seed")
    middles = [(index + 0.5) / LAST for index in range(LAST)]
    for panel, problem in zip(panels, PROBLEMS, strict=True):
        fall = [SCHEDULES["linear"](middle) for middle in middles]
        for region, color in zip(REGIONS, ("C3", "C2", "C0", "k"), strict=True):
            key = f"unscaled: linear {region}"
            runs = results.runs(key, problem)
            scale = (runs[0].region if region else (1.0,) * LAST) if runs else ()
            if len(scale) == LAST:
                left = [a * b for a, b in zip(fall, scale, strict=True)]
                panel.plot(
                    middles,
                    left,
                    color=color,
                    marker=".",
                    label="no trust region" if region is None else f"κ = {region:g}",
                )
        panel.set(ylim=(0, 1), xlabel="share of the run")
    panels[0].set_ylabel("factor of the step")
    panels[0].legend(fontsize="x-small")
    return figure
