"""How often a run diverges, by its starting damping: `python -m studies.pinn.robustness`.

A run has diverged if its error is not finite or more than twice that at the start, or if the optimizer raised an error.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from studies.pinn.command import known, main, new_app
from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import start
from studies.pinn.registry import DAMPED
from studies.pinn.runs import Store, description, draws, machine
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.reports.markdown import table

ROOT = Path(__file__).parent
EQUATIONS = ("poisson2d", "heat1d", "poisson5d", "burgers")
DAMPINGS = (1e-4, 1e-6, 1e-8, 1e-10)
SECTION = """
Runs that diverged, of all seeds, by the damping that they start with, and in brackets the median error at the end. A
run has diverged if its error is not finite or more than twice that at the start, or if the optimizer raised an error.
"""
app = new_app("studies.pinn.robustness", __doc__)


@app.default
def measure(
    *,
    problem: tuple[str, ...] = EQUATIONS,
    entrant: tuple[str, ...] = (),
    steps: int = 50,
    seeds: int = 20,
    results: Path = ROOT / "results",
) -> None:
    """Run what is missing; the page is written by `python -m studies.pinn --report-only`.

    Parameters
    ----------
    problem
        The problems.
    entrant
        The optimizers that start with a damping; all, if none is given.
    steps
        Steps of a run.
    seeds
        The number of seeds: 0, 1, 2, and so on.
    results
        Folder of the results.
    """
    problems, names = known(problem, PROBLEMS, "problem"), known(entrant, DAMPED, "entrant")
    if not names:
        raise UsageError("no optimizer of the study starts with a damping: there is nothing to run")
    if steps < 1 or seeds < 1:
        raise UsageError("--steps and --seeds must be at least 1")
    torch.set_num_threads(1)
    where, store = machine(), Store(results)
    with threadpool_limits(1):
        for seed in range(seeds):
            for one in problems:
                for name in names:
                    for damping in DAMPINGS:
                        _run_once(store, (one, name, damping), seed, steps, where)


def _run_once(store: Store, of: tuple[str, str, float], seed: int, steps: int, where: dict[str, str]) -> None:
    """Run a seed and add it to its file, unless it is there."""
    problem, name, damping = of
    head: dict[str, Any] = {"fingerprint": description(problem), "steps": steps, "machine": where}
    file = f"robustness/{problem}-{name}-{damping:g}.json"
    kept = store.read(file)
    if kept is None or (kept["fingerprint"], kept["steps"]) != (head["fingerprint"], steps):
        kept = head | {"runs": {}}
    if str(seed) not in kept["runs"]:
        kept["runs"][str(seed)] = run(problem, name, damping, seed, steps)
        store.write(file, kept)


def run(problem: str, name: str, damping: float, seed: int, steps: int) -> dict[str, Any]:
    """Return the error at the start and at the end, None if it is not finite, and the exception, or an empty text."""
    equation = PROBLEMS[problem]
    model = start(equation, seed)
    first, failure = equation.error(model), ""
    try:
        entrant = DAMPED[name](damping)(equation, model)
        for _, points in zip(range(steps), draws(equation, entrant.fixed_points, seed), strict=False):
            entrant.step(points)
    except Exception as error:  # whatever an optimizer raises is a result
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    last = equation.error(model)
    return {"start": first, "end": last if math.isfinite(last) else None, "failure": failure}


def has_diverged(run: dict[str, Any]) -> bool:
    """Return whether a run has diverged."""
    return bool(run["failure"]) or run["end"] is None or run["end"] > 2 * run["start"]


def sections(store: Store) -> Iterator[str]:
    """Yield the part of the page on robustness: a table for each optimizer."""
    written = False
    for name in DAMPED:
        lines = [(f"{damping:g}", *(_cell(store, one, name, damping) for one in EQUATIONS)) for damping in DAMPINGS]
        if any(cell != "-" for line in lines for cell in line[1:]):
            if not written:
                yield "## Starting damping"
                yield " ".join(SECTION.split())
            written = True
            yield f"### `{name}`"
            yield table(("damping", *EQUATIONS), lines)


def _cell(store: Store, problem: str, name: str, damping: float) -> str:
    kept = store.read(f"robustness/{problem}-{name}-{damping:g}.json")
    if kept is None or kept["fingerprint"] != description(problem):
        return "-"
    runs = list(kept["runs"].values())
    ends = [math.inf if has_diverged(one) else one["end"] for one in runs]
    median = statistics.median(ends)
    shown = f"{median:.1e}" if math.isfinite(median) else "failed"
    return f"{sum(map(has_diverged, runs))} of {len(runs)} ({shown}, {kept['steps']} steps)"


if __name__ == "__main__":
    sys.exit(main(app))
