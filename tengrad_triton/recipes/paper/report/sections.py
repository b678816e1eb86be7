"""The parts of the paper's report: tables of ours beside the paper's."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tengrad_triton.recipes.paper.measurements.complexity import PUBLISHED
from tengrad_triton.recipes.paper.published import ROWS
from tengrad_triton.recipes.paper.report.seeds import Finished, Spread, by_optimizer, levels, times_to
from tengrad_triton.recipes.reports.run_page import table

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
    "Top is the best test accuracy after an epoch, as a mean over the runs. To SGD's top: the training time to SGD's "
    "mean top accuracy, over the runs that reach it. Resolution is one epoch."
)
DISTANCES = ("relative", "of curvature", "cosine")
INVERSE_NOTE = (
    "Relative: ‖X - X*‖ / ‖X*‖ in the Frobenius norm, X* being exact NGD's block of (F + αI)⁻¹ over all parameters. Of "
    "curvature: ‖X - X*‖ / ‖X* - I/α‖, where 1 is as far as no curvature at all. Cosine: of the angle between X - I/α "
    "and X* - I/α, which is their structure without its size. All but the last use a row for every class of every "
    "sample; the last draws one label a sample, as training does."
)
Files = Mapping[str, str]


def spread(found: Spread, digits: int) -> str:
    """Return a mean, with its standard deviation if it is of several."""
    return f"{found.mean:.{digits}f}" + (f" ± {found.std:.{digits}f}" if found.count > 1 else "")


def outcome(title: str, runs: Sequence[Finished]) -> list[str]:
    """Return a row's tables: top accuracies and times, and the times to fixed accuracies."""
    reported = {str(name): value for row in ROWS if row.title == title for name, value in row.reported.items()}
    groups = by_optimizer(runs)
    sound = {name: [run for run in group if not run.diverged] for name, group in groups.items()}
    rivals = [run.top()[0] for run in sound.get("sgd", [])]
    target = statistics.mean(rivals) if rivals else None
    rows = [_outcome_row(name, groups[name], sound[name], reported.get(name), target) for name in groups]
    parts = [table(OUTCOME, rows), OUTCOME_NOTE, *_verdict(sound, target)]
    fixed = levels(sound)
    if fixed:
        heading = ("optimizer", *(f"to {level} %" for level in fixed))
        lines = [(name, *(_time_to(sound[name], level) for level in fixed)) for name in groups]
        parts += ["Seconds of training to fixed test accuracies:", table(heading, lines)]
    return parts


def _outcome_row(
    name: str,
    runs: Sequence[Finished],
    sound: Sequence[Finished],
    paper: tuple[int, float] | None,
    target: float | None,
) -> tuple[str, ...]:
    theirs = (f"{paper[1]:.2f} %", f"{paper[0]} s") if paper else ("-", "-")
    count = f"{len(runs)}" if len(sound) == len(runs) else f"{len(runs)}, {len(runs) - len(sound)} diverged"
    if not sound:
        return (name, *theirs, "diverged", "-", "-", "-", "-", count)
    tops = [run.top() for run in sound]
    epoch, wall = (
        Spread.of([statistics.median(row[clock] for row in run.rows) for run in sound])
        for clock in (sound[0].clock_of, "train_seconds")
    )
    return (
        name,
        *theirs,
        f"{spread(Spread.of([top for top, _ in tops]), 2)} %",
        f"{spread(Spread.of([seconds for _, seconds in tops]), 1)} s",
        "-" if target is None else _time_to(sound, target),
        f"{spread(epoch, 1)} s",
        f"{spread(wall, 1)} s",
        count,
    )


def _time_to(runs: Sequence[Finished], accuracy: float) -> str:
    found, reached = times_to(runs, accuracy)
    if found is None:
        return "not reached"
    return f"{spread(found, 1)} s" + ("" if reached == len(runs) else f" ({reached} of {len(runs)} runs)")


def _verdict(sound: Mapping[str, Sequence[Finished]], target: float | None) -> list[str]:
    """Say in a sentence what the paper claims of a row, with our numbers."""
    if target is None or not sound.get("tengrad"):
        return []
    times = {name: times_to(runs, target) for name, runs in sound.items() if runs}
    said = [f"{name} {_time_to(sound[name], target)}" for name in times]
    return [f"To SGD's own top accuracy, {target:.2f} %: {'; '.join(said)}."]


def inverse(name: str, what: str, found: Mapping[str, Any], file: str) -> list[str]:
    """Return one of figures 6 to 8 with its distances."""
    rows = [
        (method, *("-" if distance[key] is None else f"{distance[key]:.4f}" for key in DISTANCES))
        for method, distance in found["distances"].items()
    ]
    number, shape = name.removeprefix("figure"), " × ".join(map(str, found["weight"]))
    about = (
        f"Weight {shape}, {found['shown']} of its entries; {found['samples']} samples, α = {found['damping']}, after "
        f"one epoch of SGD; scale: {found['scale']}."
    )
    heading = ("block of the inverse", *DISTANCES)
    return [f"## Figure {number}: {what} of 3C1F", about, f"![The {what}]({file})", table(heading, rows), INVERSE_NOTE]


def searches(grid: Mapping[str, Sequence[Finished]], files: Files) -> list[str]:
    """Return figures 9 and 10, and the best of every optimizer's grid beside tables 3 to 5."""
    if not grid:
        return []
    parts = ["## Figures 9 and 10, tables 3 to 5: hyperparameters"]
    parts += [f"![{name} by hyperparameters]({files[name]})" for name in ("figure9", "figure10") if name in files]
    rows = [_best(title, name, group) for title, runs in grid.items() for name, group in by_optimizer(runs).items()]
    heading = ("row", "optimizer", "paper's choice", "best of ours", "its top accuracy", "points diverged")
    text = "Learning rate, weight decay and damping, chosen by top test accuracy as in the paper:"
    return [*parts, text, table(heading, rows)]


def _best(title: str, name: str, runs: Sequence[Finished]) -> tuple[str, ...]:
    """Return the point of a grid whose top accuracy is best as a mean over its seeds, beside the paper's."""
    tuned = {str(key): value for row in ROWS if row.title == title for key, value in row.tuned.items()}
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
    """Return the exponents of table 1."""
    exponents: dict[str, dict[str, Any]] = {}
    for case in found["cases"]:
        exponents.setdefault(case["optimizer"], {})[case["quantity"]] = case["exponents"]
    rows = []
    for name, by_quantity in exponents.items():
        for place, cost in enumerate(("curvature", "step")):
            fits = (f"{by_quantity[q][cost]:.2f}" if cost in by_quantity[q] else "-" for q in by_quantity)
            formula = PUBLISHED.get(name, ("-", "-"))[place]  # type: ignore[call-overload]
            rows.append((f"{name}, {cost}", formula, *fits))
    quantities = list(next(iter(exponents.values())))
    base = ", ".join(f"{key} {value}" for key, value in found["base"].items())
    text = (
        f"Exponents of power laws through the measured costs of a perceptron with hidden layers of equal width; what "
        f"does not vary is at {base}. The curvature is what a step that refreshes takes longer than one that does not; "
        "the step is the optimizer's own part of the latter. Medians of interleaved rounds; fixed costs flatten small "
        "sizes."
    )
    heading = ("optimizer, cost", "paper: a layer, m samples, d wide", *(f"by {q}" for q in quantities))
    return ["## Table 1: cost by batch, width and depth", text, table(heading, rows), f"![Costs]({files['table1']})"]


def phases(found: Mapping[str, Any], files: Files) -> list[str]:
    """Return the time of a step by phase."""
    steps = {
        f"{name}, {kind}" if len(by_kind) > 1 else name: parts
        for name, by_kind in found["seconds"].items()
        for kind, parts in by_kind.items()
    }
    heading = ("step", *next(iter(steps.values())), "all")
    rows = [
        (label, *(f"{1e3 * part:.2f}" for part in parts.values()), f"{1e3 * sum(parts.values()):.2f}")
        for label, parts in steps.items()
    ]
    text = (
        f"Milliseconds of one step by the wall clock, under torch's profiler, {found['title']}, batch "
        f"{found['batch_size']}; one optimizer after the other, so that parts compare best within a row. An optimizer "
        "that marks no phase has its step as the update; a further evaluation is in forward and backward."
    )
    return ["## Time of a step by phase", text, table(heading, rows), f"![Phases]({files['phases']})"]


def memory(found: Mapping[str, Any], files: Files) -> list[str]:
    """Return peak memory."""
    peaks = found["bytes"]
    base = peaks.get("sgd")
    rows = [(name, f"{b / 2**20:.0f}", f"{b / base:.2f}" if base else "-") for name, b in peaks.items()]
    text = (
        f"MiB at the peak of a few steps beyond what the libraries take, with two refreshes among them, each optimizer "
        f"in a process of its own: {found['model']}, width {found['width']}, {found['parameters']} parameters, batch "
        f"{found['batch_size']}."
    )
    return ["## Peak memory", text, table(("optimizer", "MiB", "× SGD"), rows)]


MEASURED: Mapping[str, Callable[[Mapping[str, Any], Files], list[str]]] = {
    "table1": table1,
    "phases": phases,
    "memory": memory,
}
