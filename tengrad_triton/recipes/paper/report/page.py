"""The paper's report as Markdown: a pure function of the document and of the names of its figures.

Every number is measured, or the paper's own and marked as such.
"""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tengrad_triton.recipes.paper.published import ROWS
from tengrad_triton.recipes.paper.report import sections
from tengrad_triton.recipes.paper.report.seeds import ORDER, Finished
from tengrad_triton.recipes.paper.request import INVERSES, OF_RUNS
from tengrad_triton.recipes.reports.run_page import block, cell, table

GENERATED = "<!-- Written by `tengrad-triton paper`: changes by hand are lost. -->"
INTRODUCTION = (
    "The experiments of Soori et al. 2021 by `tengrad-triton paper`, with the paper's numbers beside ours. The paper's "
    "are means of five runs on a V100; ours are means over the seeds, ± their standard deviation, on the machine "
    "below. A run counts as diverged if its loss is no number, or stays a tenth above its first value for an epoch."
)
SCALES = "Each part says what of its scale is not the paper's. All numbers: [paper.json](paper.json)."
CLOCKS = {
    "train_seconds": "Times are those of training, after a warm-up and without the evaluations.",
    "cpu_seconds": (
        "Times are the processor's in training, after a warm-up and without the evaluations: all ran on one thread of "
        "a CPU that other programs shared, and waiting for them is not counted."
    ),
}
SHARED = ("model", "width", "train_limit", "test_limit", "epochs", "batch_size", "decay_at", "decay")
PLACE = (
    *("device", "device_type", "cores", "threads", "platform"),
    *("python", "torch", "triton", "tengrad-triton", "commit"),
)
Files = Mapping[str, str]  # a figure's name and its file
Document = Mapping[str, Any]


def finished(document: Document, kind: str) -> dict[str, list[Finished]]:
    """Return the runs of each row."""
    by_row: dict[str, list[Finished]] = {}
    clock = clock_of(document)
    for run in document["runs"]:
        if run["kind"] == kind:
            tuned = {key: run["own"][key] for key in ("lr", "weight_decay", "damping") if key in run["own"]}
            entry = Finished(run["optimizer"], run["settings"]["seed"], run["rows"], run["diverged"], tuned, clock)
            by_row.setdefault(run["row"], []).append(entry)
    place = {name: number for number, name in enumerate(ORDER)}
    return {row: sorted(runs, key=lambda run: (place[run.optimizer], run.seed)) for row, runs in by_row.items()}


def clock_of(document: Document) -> str:
    """Return which column of the rows is the clock of all runs."""
    machines = [run["machine"] for run in document["runs"]]
    alone = all(machine["device_type"] == "cpu" and machine["threads"] == 1 for machine in machines)
    return "cpu_seconds" if alone else "train_seconds"


def markdown(document: Document, files: Files) -> str:
    """Return the page."""
    parts = [GENERATED, "# The paper's experiments", f"{INTRODUCTION} {CLOCKS[clock_of(document)]}", SCALES]
    for title, runs in finished(document, "runs").items():
        scale = scale_of(document, title)
        parts += [
            f"## Table 2: {title}",
            f"Scale: {scale}. {_resolution(document, title, runs)}",
            *sections.outcome(title, runs),
            *_curves(title, files),
        ]
    parts += _missing(document)
    for name, what in INVERSES.items():
        if name in document["measured"]:
            parts += sections.inverse(name, what, document["measured"][name], files[name])
    parts += sections.searches(finished(document, "grid"), files)
    for name, write in sections.MEASURED.items():
        if name in document["measured"]:
            parts += write(document["measured"][name], files)
    return "\n\n".join([*parts, *_what_was_run(document)]) + "\n"


def _resolution(document: Document, title: str, runs: Sequence[Finished]) -> str:
    """Say how far the test set alone leaves an accuracy uncertain."""
    images = min(run["machine"]["test_images"] for run in document["runs"] if run["row"] == title)
    share = statistics.mean(run.top()[0] for run in runs) / 100
    error = 100 * math.sqrt(share * (1 - share) / images)
    return f"With {images} test images a single accuracy has a standard error of {error:.1f} points."


def scale_of(document: Document, title: str, kind: str = "runs") -> str:
    """Return what of a row's runs is smaller than the paper's."""
    row = next(row for row in ROWS if row.title == title)
    scales = (row.scale_of(run["settings"]) for run in document["runs"] if (run["row"], run["kind"]) == (title, kind))
    return "; ".join(dict.fromkeys(scales))


def _curves(title: str, files: Files) -> list[str]:
    """Return a row's figures, by the numbers that they have in the paper."""
    row = next(row for row in ROWS if row.title == title)
    lines = []
    for quantity in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        name = f"{row.key}-{quantity}"
        if name in files:
            shown = [f"figure {n.removeprefix('figure')}" for n in figures_of(title, quantity)]
            place = f"the paper's {' and '.join(shown)}" if shown else "not in the paper"
            caption = f"{quantity.replace('_', ' ')} by epoch and by time; {place}"
            lines.append(f"![{title}: {caption}]({files[name]})")
    return lines


def figures_of(title: str, quantity: str) -> list[str]:
    """Return which of the paper's figures show a quantity of a row."""
    words = {"train_loss": ("Training loss",), "train_accuracy": ("Train a",), "test_accuracy": ("Test a", "Train and")}
    chosen = words.get(quantity, ())
    if quantity == "train_accuracy":
        chosen = (*chosen, "Train and")
    return [
        name
        for name, (what, rows) in OF_RUNS.items()
        if name != "table2" and what.startswith(chosen) and chosen and any(row.title == title for row in rows)
    ]


def _missing(document: Document) -> list[str]:
    done = finished(document, "runs")
    rows = [
        (row.title, *(f"{row.reported[name][1]:.2f} % in {row.reported[name][0]} s" for name in ("sgd", "tengrad")))
        for row in ROWS
        if row.title not in done
    ]
    full = "" if any(run["machine"]["device_type"] == "cuda" for run in document["runs"]) else sections.NO_GPU
    lines = [line for line in (full,) if line]
    if rows:
        heading = ("row", "the paper's SGD", "the paper's TENGraD", "ours")
        lines.append(table(heading, [(*row, "not measured") for row in rows]))
    return ["## Not measured", *lines] if lines else []


def _what_was_run(document: Document) -> list[str]:
    """Return commands, settings and machines."""
    commands = [f"tengrad-triton {shlex.join(entry['command'])}" for entry in document["asked"]]
    parts = ["## What was run", block("\n".join(commands), "bash")]
    kinds: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in sorted(document["runs"], key=lambda run: ORDER.index(run["optimizer"])):
        if run["kind"] == "runs":
            kinds.setdefault((run["row"], run["optimizer"]), run)
    for title in dict.fromkeys(title for title, _ in kinds):
        runs = {name: run for (row, name), run in kinds.items() if row == title}
        shared = next(iter(runs.values()))["settings"]
        parts.append(f"{title}: {_listed({key: shared[key] for key in SHARED if key in shared})}.")
        parts.append(table(("optimizer", "settings"), [(name, _listed(run["own"])) for name, run in runs.items()]))
    return [*parts, "## Where", *_machines(document)]


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in settings.items() if value is not None)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machines(document: Document) -> list[str]:
    """Return a column for every machine, commit and number of threads."""
    of: dict[tuple[str, ...], dict[str, None]] = {}  # what ran there, in order
    for run in sorted(document["runs"], key=lambda run: ORDER.index(run["optimizer"])):
        of.setdefault(_where(run["machine"]), {})[f"{run['row']}: {run['optimizer']}"] = None
    for name, found in document["measured"].items():
        of.setdefault(_where(found["machine"]), {})[name] = None
    if not of:
        return ["Nothing has been measured yet."]
    heading: Sequence[str] = ("", *(f"start {number}" for number in range(1, len(of) + 1)))
    rows = [(key, *values) for key, *values in zip(PLACE, *of, strict=True)]
    return [table(heading, rows), *(f"Start {n}: {'; '.join(what)}." for n, what in enumerate(of.values(), 1))]


def _where(machine: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(cell(machine.get(key)) for key in PLACE)
