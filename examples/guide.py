"""What the pages of the examples share: the curves and the table of a race, and the page. All numbers are measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.race import Runner, best_of
from tengrad_triton.files import replacing
from tengrad_triton.recipes.measuring.machine import describe
from tengrad_triton.recipes.reports.markdown import block, machine_table, table
from tengrad_triton.recipes.reports.run_figures import MARKERS
from tengrad_triton.recipes.reports.styles import STYLES

GENERATED = "<!-- Written by `{command}`: changes by hand are lost. -->"
CLOCK = (
    "Every setting had the same wall-clock time for its steps, in turns of one step within one process, so that other "
    "load delays all alike. The time of measurements does not count. Best is the best of all measurements. {threads}."
)
OUTCOME = ("optimizer", "setting", "best {value}", "at the end", "steps", "ms a step", "s to {reference}'s best")


def display() -> Progress:
    """Return the progress bar of a race."""
    return Progress(TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())


def curves(
    path: Path, runners: Sequence[Runner], label: str, title: str, scale: Literal["log", "linear"] = "log"
) -> None:
    """Write a PNG file with the curve of each optimizer's best setting, by time and by step."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    by_time, by_step = figure.subplots(1, 2, sharey=True)
    for (color, marker), runner in zip(cycle(STYLES), best_of(runners), strict=False):
        values = [point.value for point in runner.curve]
        style = {"color": color, "marker": marker, "markevery": max(1, len(values) // MARKERS), "markersize": 5}
        by_time.plot([p.seconds for p in runner.curve], values, label=f"{runner.name}, {runner.setting}", **style)
        by_step.plot([max(1, p.step) for p in runner.curve], values, **style)
    for panel in (by_time, by_step):
        panel.set_yscale(scale)
        panel.grid(alpha=0.3)
    by_time.set(xlabel="time of stepping (s)", ylabel=label)
    by_step.set(xlabel="step", xscale=scale)
    by_time.legend(fontsize="small", loc="upper right")
    figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def outcome(runners: Sequence[Runner], value: str, reference: str) -> str:
    """Return a table with a line for each setting; the last column has the time to the best value of ``reference``."""
    target = min(runner.best for runner in runners if runner.name == reference)
    titles = [title.format(value=value, reference=reference) for title in OUTCOME]
    return table(titles, list(_lines(runners, target)))


def _lines(runners: Sequence[Runner], target: float) -> Iterator[tuple[str, ...]]:
    for r in runners:
        there = r.reached(target)
        time = "–" if there is None else f"{there.seconds:.1f}"
        values = (f"{value:#.3g}" for value in (r.best, r.curve[-1].value))
        yield r.name, r.setting, *values, str(r.steps), f"{1e3 * r.seconds / r.steps:.1f}", time


def write(path: Path, command: str, sections: Sequence[str], wall: float) -> None:
    """Write the page: its sections, the command, and the machine; the whole run took ``wall`` seconds."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    where = describe(torch.device("cpu")) | {"the whole run (s)": round(wall), "load average at its end": load}
    again = ["## To run it again", block(command, "bash"), "## Where", machine_table([where])]
    text = "\n\n".join([GENERATED.format(command=command), *sections, *again]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def times(ratio: float) -> str:
    """Return a ratio with two significant digits."""
    return f"{float(f'{ratio:.2g}'):,g}"


def clock() -> str:
    """Return the note on how times were measured."""
    threads = torch.get_num_threads()
    return CLOCK.format(threads=f"{threads} thread{'s' if threads > 1 else ''}")
