"""The report as Markdown: a pure function of the document and of the files of its figures.

Every number is measured, or is the paper's own and marked as such.
"""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tengrad_triton.recipes.optimizers.registry import place
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.paper.report import sections
from tengrad_triton.recipes.paper.report.document import Document, clock_of, experiment_of, finished, scale_of
from tengrad_triton.recipes.paper.report.seeds import Finished
from tengrad_triton.recipes.paper.request import INVERSES, OF_RUNS
from tengrad_triton.recipes.reports.markdown import block, cell, table

GENERATED = "<!-- Written by `tengrad-triton paper`: changes by hand are lost. -->"
INTRODUCTION = (
    "The experiments of Soori et al. 2021, run by `tengrad-triton paper`, with the paper's numbers beside ours. The "
    "paper's are means of five runs on a V100; ours are means over the seeds, ± their standard deviation, on the "
    "machine below. A run counts as diverged if its loss is not finite, or if all losses of an epoch are more than a "
    "tenth above the first loss."
)
SCALES = "Each section says how its scale differs from the paper's. All numbers: [paper.json](paper.json)."
CLOCKS = {
    "train_seconds": "Times are those of training, after a warm-up and without the evaluations.",
    "cpu_seconds": (
        "Times are the CPU time of training, after a warm-up and without the evaluations. All runs had one thread of a "
        "CPU that other programs shared; CPU time does not count the waiting for them."
    ),
}
SHARED = ("model", "width", "train_limit", "test_limit", "epochs", "batch_size", "decay_at", "decay")
PLACE = (
    *("device", "device_type", "cores", "threads", "platform"),
    *("python", "torch", "triton", "tengrad-triton", "commit"),
)
CAPTIONS: Mapping[str, tuple[str, ...]] = {  # of the paper's figures that show a quantity: how their captions begin
    "train_loss": ("Training loss",),
    "train_accuracy": ("Train a", "Train and"),
    "test_accuracy": ("Test a", "Train and"),
}
Files = Mapping[str, str]  # from a figure's name to its file


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
    """Return a sentence about how uncertain an accuracy is because of the size of the test set."""
    images = min(run["machine"]["test_images"] for run in document["runs"] if run["row"] == title)
    share = statistics.mean(run.top()[0] for run in runs) / 100
    error = 100 * math.sqrt(share * (1 - share) / images)
    return f"With {images} test images a single accuracy has a standard error of {error:.1f} points."


def _curves(title: str, files: Files) -> list[str]:
    """Return the figures of an experiment, with the numbers that they have in the paper."""
    lines = []
    for quantity in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        name = f"{experiment_of(title).key}-{quantity}"
        if name in files:
            shown = [f"figure {n.removeprefix('figure')}" for n in figures_of(title, quantity)]
            place = f"the paper's {' and '.join(shown)}" if shown else "not in the paper"
            caption = f"{quantity.replace('_', ' ')} by epoch and by time; {place}"
            lines.append(f"![{title}: {caption}]({files[name]})")
    return lines


def figures_of(title: str, quantity: str) -> list[str]:
    """Return the names of the paper's figures that show a quantity of an experiment."""
    return [
        name
        for name, (caption, experiments) in OF_RUNS.items()
        if name != "table2"
        and caption.startswith(CAPTIONS.get(quantity, ()))
        and any(experiment.title == title for experiment in experiments)
    ]


def _missing(document: Document) -> list[str]:
    done = finished(document, "runs")
    lines = [
        (e.title, *(f"{e.reported[name][1]:.2f} % in {e.reported[name][0]} s" for name in ("sgd", "tengrad_paper")))
        for e in EXPERIMENTS
        if e.title not in done
    ]
    has_gpu = any(run["machine"]["device_type"] == "cuda" for run in document["runs"])
    parts = [] if has_gpu else [sections.NO_GPU]
    if lines:
        heading = ("row", "the paper's SGD", "the paper's TENGraD", "ours")
        parts.append(table(heading, [(*line, "not measured") for line in lines]))
    return ["## Not measured", *parts] if parts else []


def _what_was_run(document: Document) -> list[str]:
    """Return commands, settings and machines."""
    commands = [f"tengrad-triton {shlex.join(entry['command'])}" for entry in document["asked"]]
    parts = ["## What was run", block("\n".join(commands), "bash")]
    kinds: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in _in_order(document):
        if run["kind"] == "runs":
            kinds.setdefault((run["row"], run["optimizer"]), run)
    for title in dict.fromkeys(title for title, _ in kinds):
        runs = {name: run for (other, name), run in kinds.items() if other == title}
        shared = next(iter(runs.values()))["settings"]
        parts.append(f"{title}: {_listed({key: shared[key] for key in SHARED if key in shared})}.")
        parts.append(table(("optimizer", "settings"), [(name, _listed(run["own"])) for name, run in runs.items()]))
    return [*parts, "## Where", *_machines(document)]


def _in_order(document: Document) -> list[Mapping[str, Any]]:
    return sorted(document["runs"], key=lambda run: place(run["optimizer"]))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in settings.items() if value is not None)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machines(document: Document) -> list[str]:
    """Return a table with a column for every machine, commit and number of threads, and what ran on each."""
    of: dict[tuple[str, ...], dict[str, None]] = {}
    for run in _in_order(document):
        of.setdefault(_place(run["machine"]), {})[f"{run['row']}: {run['optimizer']}"] = None
    for name, found in document["measured"].items():
        of.setdefault(_place(found["machine"]), {})[name] = None
    if not of:
        return ["Nothing has been measured yet."]
    heading: Sequence[str] = ("", *(f"start {number}" for number in range(1, len(of) + 1)))
    lines = [(key, *values) for key, *values in zip(PLACE, *of, strict=True)]
    return [table(heading, lines), *(f"Start {n}: {'; '.join(what)}." for n, what in enumerate(of.values(), 1))]


def _place(machine: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(cell(machine.get(key)) for key in PLACE)
