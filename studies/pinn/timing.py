"""What a step costs: `python -m studies.pinn.timing`.

All optimizers step in turn in one process, on the same points.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from studies.pinn.command import installed, known, main, new_app
from studies.pinn.entrants import Entrant
from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import inputs_of, start
from studies.pinn.registry import FAMILIES
from studies.pinn.runs import Store, description, draws, machine
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.reports.markdown import table

ROOT = Path(__file__).parent
REFERENCE = "engd-w"  # whose steps the others' are compared with
WARM_UP = 3  # rounds that do not count: compiled steps are compiled in the first two
SECTION = """
CPU time of one step, the median of {rounds} rounds in which each optimizer takes a step in turn on the same points, in
one process and on one thread. *Ratio* is the median over the rounds of its time to that of {reference} in the same
round.
"""
app = new_app("studies.pinn.timing", __doc__)


@app.default
def measure(
    *,
    problem: tuple[str, ...] = (),
    entrant: tuple[str, ...] = (),
    rounds: int = 20,
    results: Path = ROOT / "results",
) -> None:
    """Time the steps, and keep the times; the page is written by `python -m studies.pinn --report-only`.

    Parameters
    ----------
    problem
        The problems; all, if none is given.
    entrant
        The optimizers, each with its first setting; all, if none is given. One that loops itself has no steps.
    rounds
        Steps of each optimizer that count.
    results
        Folder of the results.
    """
    problems = known(problem, PROBLEMS, "problem")
    families = installed(entrant, known(entrant, FAMILIES, "entrant"))
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: it must be at least 1")
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for name in problems:
            content = kept(name, timed(name, families, rounds))
            Store(results).write(f"timing/{name}.json", content)
            shown = ", ".join(f"{family} {1e3 * each:.3g} ms" for family, each in content["seconds"].items())
            sys.stdout.write(f"{name}: {shown}\n")


def timed(problem: str, families: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each round's step, for each optimizer that takes this problem without an error."""
    entrants = {family: entrant for family in families if (entrant := _built(problem, family))}
    times: dict[str, list[float]] = {family: [] for family in entrants}
    for _, points in zip(range(WARM_UP + rounds), draws(PROBLEMS[problem], False, 0), strict=False):
        for family in list(times):
            since = time.process_time()
            try:
                entrants[family].step(points)
            except Exception as error:  # as that of a matrix that cannot be factored
                sys.stderr.write(f"{problem}, {family}, left out: {error}\n")
                del times[family]
                continue
            times[family].append(time.process_time() - since)
    return {family: each[WARM_UP:] for family, each in times.items()}


def _built(problem: str, family: str) -> Entrant | None:
    """Return an optimizer with its first setting; None if it loops itself, or refuses the problem."""
    build = next(iter(FAMILIES[family].values()))
    try:
        entrant = build(PROBLEMS[problem], start(PROBLEMS[problem], 0))
    except ValueError as error:
        sys.stderr.write(f"{problem}, {family}: {error}\n")
        return None
    return None if entrant.loops else entrant


def kept(problem: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return what is kept of the times; ratios are of each round, and need the reference."""
    reference = times.get(REFERENCE, [])
    ratios = {name: [a / b for a, b in zip(each, reference, strict=False)] for name, each in times.items()}
    return {
        "fingerprint": description(problem),
        "rounds": len(next(iter(times.values()), [])),
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "ratio": {name: statistics.median(each) for name, each in ratios.items() if each},
        "rows": sum(len(inputs_of(given)[0]) for given in next(draws(PROBLEMS[problem], False, 0)).values()),
        "machine": machine(),
    }


def sections(store: Store) -> Iterator[str]:
    """Yield the part of the page on the times of steps."""
    files = {name: store.read(f"timing/{name}.json") for name in PROBLEMS}
    valid = {n: file for n, file in files.items() if file and file["fingerprint"] == description(n)}
    if not valid:
        return
    yield "## What a step costs"
    rounds = ", ".join(sorted({str(file["rounds"]) for file in valid.values()}))
    yield " ".join(SECTION.format(rounds=rounds, reference=f"`{REFERENCE}`").split())
    head = ("optimizer", *(f"{name}, {file['rows']} rows" for name, file in valid.items()))
    names = [family for family in FAMILIES if any(family in file["seconds"] for file in valid.values())]
    yield table(head, [(name, *(_cell(file, name) for file in valid.values())) for name in names])


def _cell(file: dict[str, Any], name: str) -> str:
    seconds, ratio = file["seconds"].get(name), file["ratio"].get(name)
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms" + ("" if ratio is None else f", ratio {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main(app))
