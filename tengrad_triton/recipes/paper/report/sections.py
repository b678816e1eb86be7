"""The sections of the report: tables of our numbers beside the paper's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tengrad_triton.recipes.paper.published import EXPERIMENTS, TABLE1
from tengrad_triton.recipes.paper.report.seeds import Finished, Spread, by_optimizer, levels, times_to
from tengrad_triton.recipes.reports.markdown import table

OUTCOME = (
    "optimizer",
    "paper: top",
    "paper: time",
    "top accuracy",
    "time to it",
    "to SGD's top",
    "an epoch",
    "by the wall clock",
    "runs",
)
NO_GPU = "On a GPU, at the paper's own scale: not measured."
OUTCOME_NOTE = (
    "Top is the best test accuracy after an epoch, as a mean over the runs. To SGD's top is the training time to SGD's "
    "mean top accuracy, as a mean over the runs that reach it. Times have a resolution of one epoch."
)
DISTANCES = ("relative", "of curvature", "cosine")
INVERSE_NOTE = (
    "Relative is ‖X - X*‖ / ‖X*‖ in the Frobenius norm, where X* is the block of (F + αI)⁻¹ in exact NGD, over all "
    "parameters. Of curvature is ‖X - X*‖ / ‖X* - I/α‖, which is 1 without any curvature. Cosine is that of the angle "
    "between X - I/α and X* - I/α, which compares their structure without their size. All methods but the last have a "
    "row of J for every class of every sample; the last samples one label for every sample, as training does."
)
Files = Mapping[str, str]


def spread(found: Spread, digits: int) -> str:
    """Return a mean, with its standard deviation if there are several seeds."""
    return f"{found.mean:.{digits}f}" + (f" ± {found.std:.{digits}f}" if found.count > 1 else "")


def outcome(title: str, runs: Sequence[Finished]) -> list[str]:
    """Return the tables of an experiment: top accuracies and times, and the times to fixed accuracies."""
    reported = {str(name): value for e in EXPERIMENTS if e.title == title for name, value in e.reported.items()}
    groups = by_optimizer(runs)
    sound = {name: [run for run in group if not run.diverged] for name, group in groups.items()}
    sgd_tops = [run.top()[0] for run in sound.get("sgd", [])]
    target = statistics.mean(sgd_tops) if sgd_tops else None
    lines = [_outcome_line(name, groups[name], sound[name], reported.get(name), target) for name in groups]
    parts = [table(OUTCOME, lines), OUTCOME_NOTE, *_verdict(sound, target)]
    fixed = levels(sound)
    if fixed:
        heading = ("optimizer", *(f"to {level} %" for level in fixed))
        times = [(name, *(_time_to(sound[name], level) for level in fixed)) for name in groups]
        parts += ["Seconds of training to fixed test accuracies:", table(heading, times)]
    return parts


def _outcome_line(
    name: str,
    runs: Sequence[Finished],
    sound: Sequence[Finished],
    paper: tuple[int, float] | None,
    target: float | None,
) -> tuple[str, ...]:
    published = (f"{paper[1]:.2f} %", f"{paper[0]} s") if paper else ("-", "-")
    count = f"{len(runs)}" if len(sound) == len(runs) else f"{len(runs)}, {len(runs) - len(sound)} diverged"
    if not sound:
        return (name, *published, "diverged", "-", "-", "-", "-", count)
    tops = [run.top() for run in sound]
    cpu, wall = (
        Spread.of([statistics.median(epoch[clock] for epoch in run.epochs) for run in sound])
        for clock in (sound[0].clock_column, "train_seconds")
    )
    return (
        name,
        *published,
        f"{spread(Spread.of([top for top, _ in tops]), 2)} %",
        f"{spread(Spread.of([seconds for _, seconds in tops]), 1)} s",
        "-" if target is None else _time_to(sound, target),
        f"{spread(cpu, 1)} s",
        f"{spread(wall, 1)} s",
        count,
    )


def _time_to(runs: Sequence[Finished], accuracy: float) -> str:
    found, reached = times_to(runs, accuracy)
    if found is None:
        return "not reached"
    return f"{spread(found, 1)} s" + ("" if reached == len(runs) else f" ({reached} of {len(runs)} runs)")


def _verdict(sound: Mapping[str, Sequence[Finished]], target: float | None) -> list[str]:
    """Return a sentence with the time of each optimizer to SGD's top accuracy: the paper's claim, in our numbers."""
    if target is None:
        return []
    named = [f"{name} {_time_to(runs, target)}" for name, runs in sound.items() if runs]
    return [f"To SGD's own top accuracy, {target:.2f} %: {'; '.join(named)}."]


def inverse(name: str, what: str, found: Mapping[str, Any], file: str) -> list[str]:
    """Return the section of one of figures 6 to 8, with the distances to exact NGD."""
    lines = [
        (method, *("-" if distance[key] is None else f"{distance[key]:.4f}" for key in DISTANCES))
        for method, distance in found["distances"].items()
    ]
    number, shape = name.removeprefix("figure"), " × ".join(map(str, found["weight"]))
    about = (
        f"Weight {shape}, {found['shown']} of its entries; {found['samples']} samples, α = {found['damping']}, after "
        f"one epoch of SGD; scale: {found['scale']}."
    )
    heading = ("block of the inverse", *DISTANCES)
    return [f"## Figure {number}: {what} of 3C1F", about, f"![The {what}]({file})", table(heading, lines), INVERSE_NOTE]


def searches(grid: Mapping[str, Sequence[Finished]], files: Files) -> list[str]:
    """Return figures 9 and 10, and the best point of every optimizer's grid beside tables 3 to 5."""
    if not grid:
        return []
    parts = ["## Figures 9 and 10, tables 3 to 5: hyperparameters"]
    parts += [f"![{name} by hyperparameters]({files[name]})" for name in ("figure9", "figure10") if name in files]
    lines = [_best(title, name, group) for title, runs in grid.items() for name, group in by_optimizer(runs).items()]
    heading = ("row", "optimizer", "paper's choice", "best of ours", "its top accuracy", "points diverged")
    text = "Learning rate, weight decay and damping, chosen by top test accuracy as in the paper:"
    return [*parts, text, table(heading, lines)]


def _best(title: str, name: str, runs: Sequence[Finished]) -> tuple[str, ...]:
    """Return a line: the paper's choice, and the point of the grid with the best top accuracy as a mean over seeds."""
    tuned = {str(key): value for e in EXPERIMENTS if e.title == title for key, value in e.tuned.items()}
    points: dict[tuple[float, ...], list[Finished]] = {}
    for run in runs:
        points.setdefault(tuple(run.tuned.values()), []).append(run)
    means = {
        point: statistics.mean(run.top()[0] for run in of)
        for point, of in points.items()
        if not any(run.diverged for run in of)
    }
    best = max(means, key=lambda point: means[point], default=None)
    cells = ("-", "-") if best is None else (_numbers(best), f"{means[best]:.2f} %")
    return (title, name, _numbers(tuned.get(name, ())), *cells, f"{len(points) - len(means)} of {len(points)}")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(str, values)) or "-"


def table1(found: Mapping[str, Any], files: Files) -> list[str]:
    """Return the section of table 1, with the measured exponents."""
    exponents: dict[str, dict[str, Any]] = {}
    for case in found["cases"]:
        exponents.setdefault(case["optimizer"], {})[case["quantity"]] = case["exponents"]
    lines = []
    for name, by_quantity in exponents.items():
        for place, cost in enumerate(("curvature", "step")):
            fits = (f"{by_quantity[q][cost]:.2f}" if cost in by_quantity[q] else "-" for q in by_quantity)
            formula = TABLE1.get(name, ("-", "-"))[place]
            lines.append((f"{name}, {cost}", formula, *fits))
    quantities = list(next(iter(exponents.values())))
    base = ", ".join(f"{key} {value}" for key, value in found["base"].items())
    text = (
        f"Exponents of power laws through the measured costs of a perceptron with hidden layers of equal width. One "
        f"quantity varies at a time; the others are {base}. The cost of the curvature is the time of a step that "
        "refreshes it, minus that of a step that does not; the cost of the step is the optimizer's own part of the "
        "latter. Times are medians of interleaved rounds. At small sizes fixed costs make the exponents smaller."
    )
    heading = ("optimizer, cost", "paper: a layer, m samples, d wide", *(f"by {q}" for q in quantities))
    return ["## Table 1: cost by batch, width and depth", text, table(heading, lines), f"![Costs]({files['table1']})"]


def phases(found: Mapping[str, Any], files: Files) -> list[str]:
    """Return the section on the time of a step by phase."""
    steps = {
        f"{name}, {kind}" if len(by_kind) > 1 else name: parts
        for name, by_kind in found["seconds"].items()
        for kind, parts in by_kind.items()
    }
    heading = ("step", *next(iter(steps.values())), "all")
    lines = [
        (label, *(f"{1e3 * part:.2f}" for part in parts.values()), f"{1e3 * sum(parts.values()):.2f}")
        for label, parts in steps.items()
    ]
    text = (
        f"Milliseconds of one step by the wall clock, under torch's profiler, {found['title']}, batch "
        f"{found['batch_size']}. The optimizers ran one after the other, so that the parts of a line compare best. The "
        "whole step of an optimizer that marks no phase counts as the update. A second evaluation counts as forward "
        "and backward."
    )
    return ["## Time of a step by phase", text, table(heading, lines), f"![Phases]({files['phases']})"]


def memory(found: Mapping[str, Any], files: Files) -> list[str]:
    """Return the section on peak memory."""
    peaks = found["bytes"]
    base = peaks.get("sgd")
    lines = [(name, f"{b / 2**20:.0f}", f"{b / base:.2f}" if base else "-") for name, b in peaks.items()]
    text = (
        f"Peak in MiB of a few steps, two of which refresh the curvature, without the memory of the libraries. Each "
        f"optimizer had a process of its own. {found['model']}, width {found['width']}, {found['parameters']} "
        f"parameters, batch {found['batch_size']}."
    )
    return ["## Peak memory", text, table(("optimizer", "MiB", "× SGD"), lines)]


MEASURED: Mapping[str, Callable[[Mapping[str, Any], Files], list[str]]] = {
    "table1": table1,
    "phases": phases,
    "memory": memory,
}
