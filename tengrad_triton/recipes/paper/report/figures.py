"""The figures of the report. The title of each says at which scale it was made.

Key: K entries of a weight.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from tengrad_triton.files import replacing
from tengrad_triton.recipes.paper.report.seeds import Finished, by_epoch, by_optimizer
from tengrad_triton.recipes.paper.request import Request
from tengrad_triton.recipes.reports.styles import COLORS, log_axis, style_of

QUANTITIES: Mapping[str, tuple[str, float]] = {
    "train_loss": ("training cross-entropy (nats)", 1.0),
    "test_loss": ("test cross-entropy (nats)", 1.0),
    "train_accuracy": ("train accuracy (%)", 100.0),
    "test_accuracy": ("test accuracy (%)", 100.0),
}
DPI = 90


def save(figure: Figure, out: Path, name: str) -> str:
    """Write a PNG file into the folder figures/ of the report; return its path relative to the page."""
    (out / "figures").mkdir(exist_ok=True)
    file = f"figures/paper-{name}.png"
    with replacing(out / file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return file


def curves(runs: Sequence[Finished], quantity: str, title: str, out: Path, name: str) -> str:
    """Draw a quantity by epoch and by time, with error bars of the standard deviation over the seeds."""
    label, scale = QUANTITIES[quantity]
    figure = Figure(figsize=(10, 4.6), dpi=DPI, layout="constrained")
    panels: tuple[Axes, Axes] = figure.subplots(1, 2, sharey=True)
    for optimizer, group in by_optimizer(runs).items():
        spreads, seconds = by_epoch(group, quantity, scale)
        color, marker = style_of(optimizer)
        label_of = f"{optimizer} (diverged)" if any(run.diverged for run in group) else optimizer
        for panel, x in zip(panels, (range(1, len(spreads) + 1), seconds), strict=True):
            panel.errorbar(
                x, [s.mean for s in spreads], [s.std for s in spreads],
                color=color, marker=marker, markersize=5, capsize=3, linewidth=1.3, label=label_of,
            )  # fmt: skip
    panels[0].set(xlabel="epoch", ylabel=label)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[1].set(xlabel="training time (s), evaluations excluded")
    panels[1].set_xlim(left=0)
    for panel in panels:
        panel.grid(alpha=0.3)
        if "loss" in quantity:
            log_axis(panel)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return save(figure, out, name)


def blocks(found: Mapping[str, Tensor], layer: str, request: Request, name: str) -> str:
    """Draw the entries of |α (F + αI)⁻¹ - I| for each method: the difference that curvature makes to the inverse."""
    figure = Figure(figsize=(3.4 * len(found), 4.1), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    differences = {
        method: (block - torch.eye(len(block), device=block.device)).abs().cpu() for method, block in found.items()
    }
    top = max(float(difference_KK.max()) for difference_KK in differences.values())
    norm = LogNorm(1e-4 * top, top) if top > 0 and math.isfinite(top) else None
    for panel, (method, difference_KK) in zip(panels, differences.items(), strict=True):
        shown = difference_KK.clamp(min=1e-4 * top).numpy()
        image = panel.imshow(shown, norm=norm, cmap="magma", interpolation="nearest")
        panel.set_title(method, fontsize="medium")
        panel.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, shrink=0.8)
    figure.suptitle(f"3C1F, {layer}: |α (F + αI)⁻¹ - I|; scale: {request.scale.description()}", fontsize="medium")
    return save(figure, request.out, name)


def sensitivity(cells: Mapping[tuple[float, float], float | None], title: str, out: Path, name: str) -> str:
    """Draw accuracies by learning rate and damping; None stands for a run that diverged."""
    rates, dampings = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    table = [[cells.get((lr, damping)) for lr in rates] for damping in dampings]
    figure = Figure(figsize=(1.6 + 0.9 * len(rates), 1.6 + 0.55 * len(dampings)), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    numbers = [[math.nan if cell is None else cell for cell in line] for line in table]
    panel.imshow(numbers, cmap="viridis", aspect="auto", origin="lower")
    for y, line in enumerate(table):
        for x, cell in enumerate(line):
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
            panel.text(
                x, y, "diverged" if cell is None else f"{cell:.1f}", ha="center", va="center", fontsize=8, bbox=box
            )
    panel.set_xticks(range(len(rates)), [str(rate) for rate in rates])
    panel.set_yticks(range(len(dampings)), [str(damping) for damping in dampings])
    panel.set(xlabel="learning rate", ylabel="damping")
    figure.suptitle(fill(title, 70), fontsize="medium")
    return save(figure, out, name)


def complexity(cases: Sequence[Mapping[str, Any]], base: Mapping[str, int], out: Path) -> str:
    """Draw the costs of table 1 by each quantity, on logarithmic axes."""
    quantities = list(dict.fromkeys(case["quantity"] for case in cases))
    figure = Figure(figsize=(3.6 * len(quantities), 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(quantities), squeeze=False, sharey="row", sharex="col")
    for panels, cost in zip(grid, ("curvature", "step"), strict=True):
        for panel, quantity in zip(panels, quantities, strict=True):
            for case in (case for case in cases if case["quantity"] == quantity):
                color, marker = style_of(case["optimizer"])
                seconds = [1e3 * s if s > 0 else math.nan for s in case["seconds"][cost]]
                panel.plot(case["values"], seconds, color=color, marker=marker, markersize=5, label=case["optimizer"])
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_major_locator(FixedLocator(case["values"]))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xticklabels([str(value) for value in case["values"]])
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("refresh minus step (ms)" if cost == "curvature" else "the optimizer's step (ms)")
    for panel, quantity in zip(grid[1], quantities, strict=True):
        panel.set_xlabel(quantity)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    figure.suptitle("perceptron, " + ", ".join(f"{key} {value}" for key, value in base.items()), fontsize="small")
    return save(figure, out, "table1")


def phases(seconds: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, out: Path) -> str:
    """Draw the phases of a step as stacked bars, for steps that reuse the curvature and for steps that refresh it."""
    figure = Figure(figsize=(10, 0.9 + 0.36 * len(seconds)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ("reuse", "refresh"), strict=True):
        for place, by_kind in enumerate(seconds.values()):
            left = 0.0
            for (phase, part), color in zip(by_kind.get(kind, {}).items(), COLORS, strict=False):
                panel.barh(place, 1e3 * part, left=1e3 * left, color=color, label=phase if place == 0 else None)
                left += part
        panel.set(xlabel="ms", title=f"a step that {'reuses the curvature' if kind == 'reuse' else 'refreshes it'}")
    panels[0].set_yticks(range(len(seconds)), list(seconds))
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return save(figure, out, "phases")
