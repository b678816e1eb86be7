"""The figure of the page: the mean step over SGD's, by the number of processes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from studies.processes.answers import FEW_ROWS, INTERVALS, SAMPLES, Answers, fits_memory, powers
from studies.processes.model import Way
from studies.processes.store import Store
from studies.processes.times import TIMED
from tengrad_triton.files import replacing
from tengrad_triton.recipes.reports.styles import style_at

FILE = "scaling-steps.png"
LINES: dict[str, tuple[Way, int | None]] = {
    "global, all rows": ("DDP, global", None),
    f"global, fisher_rows={FEW_ROWS}": ("DDP, global", FEW_ROWS),
    "local": ("DDP, local", None),
    "fully_shard, global, all rows": ("FSDP2, global", None),
}


def draw(store: Store, folder: Path) -> None:
    """Write ``scaling-steps.png`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as temporary:
        of_models(answers_of(store)).savefig(temporary, format="png", metadata={"Software": None})


def answers_of(store: Store) -> Answers:
    """Return the cost model with the measured seconds of the host; raises `FileNotFoundError` without them."""
    if store.host is None:
        raise FileNotFoundError(f"{store.folder} has no seconds of the host: run `python -m studies.processes`")
    return Answers(store.host)


def of_models(answers: Answers) -> Figure:
    """Draw a panel for each model; lines end where a refresh no longer fits into memory."""
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(TIMED), sharey=True)
    samples, every = SAMPLES[0], INTERVALS[-1]
    for panel, name in zip(panels, TIMED, strict=True):
        for place, (label, (way, rows)) in enumerate(LINES.items()):
            counts = [count for count in powers() if fits_memory(name, samples, count, way)]
            line = [answers.over_sgd(name, samples, count, way, every, rows) for count in counts]
            color, marker = style_at(place)
            panel.plot(counts, line, color=color, marker=marker, markersize=4, label=label)
            if len(counts) < len(list(powers())):
                panel.plot(counts[-1:], line[-1:], color=color, marker="x", markersize=11, mew=2)
        panel.axhline(answers.limit(name, samples, every), color="0.4", linestyle=":", linewidth=1.2)
        _label(panel, name)
    panels[0].set_ylabel("mean step over SGD's under DDP")
    figure.suptitle(
        f"Predicted mean step, {samples} samples a process, a refresh every {every} steps. Dotted: one process + 0.15 "
        "of SGD's step. Crosses: the next refresh does not fit into 141 GB.",
        fontsize="small",
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _label(panel: Axes, name: str) -> None:
    panel.set(xscale="log", yscale="log", title=name, xlabel="processes", ylim=(1, 30))
    panel.xaxis.set_major_locator(FixedLocator([1, 8, 64, 512, 4096]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_locator(FixedLocator([1, 1.5, 2, 3, 5, 10, 20, 30]))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
