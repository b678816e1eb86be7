"""What is left to do, and how long it takes. Mistakes and lack of memory show before anything is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from tengrad_triton.recipes.paper.estimates import Found, probe_of_steps, seconds_of_run, take_all
from tengrad_triton.recipes.paper.measurements.costs import COSTS, seconds_of_epoch
from tengrad_triton.recipes.paper.measurements.subject import job_for, reads_data
from tengrad_triton.recipes.paper.memory import check_memory, check_run, needed_bytes
from tengrad_triton.recipes.paper.request import INVERSES
from tengrad_triton.recipes.paper.runs import PaperRun
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.paper.table import Row


@dataclass(frozen=True)
class Left:
    """The runs and the measurements that the output folder lacks."""

    runs: Sequence[PaperRun]
    measurements: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.runs or self.measurements)

    def kinds(self) -> list[list[PaperRun]]:
        """Return the runs by experiment and optimizer: those of one kind take the same time."""
        by_kind: dict[tuple[str, str], list[PaperRun]] = {}
        for run in self.runs:
            by_kind.setdefault((run.experiment.title, run.name), []).append(run)
        return list(by_kind.values())


def forecast(left: Left, shared: Shared) -> list[Row]:
    """Return the estimates of everything that is left.

    Raises `UsageError` if data cannot be read, or if something needs more memory than is free.
    """
    shared.load(run.settings for run in left.runs)
    for target in left.measurements:
        if reads_data(target, shared.request):
            job_for(shared, "sgd")
    _check_memory(left, shared)
    of_runs = (probe_of_steps(shared.job(first.settings), first.name) for first, *_ in left.kinds())
    of_targets = (probe for target in left.measurements for probe in COSTS[target].probes(target, shared))
    found = take_all([*of_runs, *of_targets], shared)
    rows = [_row_of_runs(runs, shared, found) for runs in left.kinds()]
    if any(target in INVERSES for target in left.measurements):
        rows.append(_row_of_epoch(shared, found))
    return [*rows, *(_row_of_target(target, shared, found) for target in left.measurements)]


def _check_memory(left: Left, shared: Shared) -> None:
    for first, *_ in left.kinds():
        check_run(shared.job(first.settings), first.name)
    for target in left.measurements:
        advice = "lower --scale.batch-size or --scale.width" if target != "table1" else "name fewer optimizers"
        check_memory(target, COSTS[target].needed(target, shared), shared.device, advice)


def _row_of_runs(runs: Sequence[PaperRun], shared: Shared, found: Found) -> Row:
    first = runs[0]
    job = shared.job(first.settings)
    each = seconds_of_run(job, found[probe_of_steps(job, first.name).key])
    epochs = sum(run.epochs_left(shared.request.out) for run in runs)
    seconds = each * epochs / first.settings.epochs
    return Row(first.experiment.title, first.name, len(runs), each, seconds, needed_bytes(job, first.name))


def _row_of_epoch(shared: Shared, found: Found) -> Row:
    seconds = seconds_of_epoch(shared, found)
    return Row("for figures 6 to 8", "sgd", 1, seconds, seconds, needed_bytes(job_for(shared, "sgd"), "sgd"))


def _row_of_target(target: str, shared: Shared, found: Found) -> Row:
    seconds = COSTS[target].seconds(target, shared, found)
    return Row(target, "", 1, seconds, seconds, COSTS[target].needed(target, shared))
