"""Optimizers for least squares on differential equations, by CPU time; docs/pinn.md is its page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch._inductor.utils import fresh_cache

from studies.pinn import figures, page, runs
from studies.pinn.command import installed, known, main, new_app
from studies.pinn.problems import PROBLEMS
from studies.pinn.registry import FAMILIES
from tengrad_triton.recipes.errors import UsageError

ROOT = Path(__file__).parent
app = new_app("studies.pinn", __doc__)


@app.default
def study(
    *,
    problem: tuple[str, ...] = (),
    entrant: tuple[str, ...] = (),
    seconds: float = 60.0,
    seeds: tuple[int, ...] = runs.SEEDS,
    out: Path = ROOT.parents[1] / "docs",
    results: Path = ROOT / "results",
    report_only: bool = False,
) -> None:
    """Run what is missing, on one thread, and write the page and its figures.

    Parameters
    ----------
    problem
        The problems to run; all, if none is given.
    entrant
        The optimizers to run; all that are installed, if none is given. Each of its settings runs with the first
        seed, the best with all.
    seconds
        CPU seconds of the steps of a run.
    seeds
        Seeds of weights and points.
    out
        Folder of the page pinn.md; the figures go into its folder figures/.
    results
        Folder with a file for each run.
    report_only
        Whether to write the page from the kept runs, and to run nothing.
    """
    problems, families = known(problem, PROBLEMS, "problem"), known(entrant, FAMILIES, "entrant")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds {seconds:g}: it must be a number above 0")
    if not seeds:
        raise UsageError("--seeds: at least one is needed")
    store = runs.Store(results)
    if not report_only:
        measure(store, problems, installed(entrant, families), seconds, tuple(dict.fromkeys(seeds)))
    write(store, out)


def measure(
    store: runs.Store, problems: Sequence[str], families: Sequence[str], seconds: float, seeds: Sequence[int]
) -> None:
    """Run what is missing: the settings of each family with the first seed, and the best one with the others."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # compilers are children, whose time counts, not workers
    machine = runs.machine()  # asked once: the commit must be that of the loaded code
    with threadpool_limits(1):  # of numpy's and scipy's libraries
        for problem in problems:
            for family in families:
                for case in _cases(store, problem, family, seconds, seeds):
                    _run_once(store, case, machine)


def _cases(store: runs.Store, problem: str, family: str, seconds: float, seeds: Sequence[int]) -> Iterator[runs.Case]:
    for variant in FAMILIES[family]:
        yield runs.Case(problem, family, variant, seconds, seeds[0])
    best = runs.best(store, problem, family, seconds, seeds[0])
    for seed in seeds[1:]:
        yield runs.Case(problem, family, str(best), seconds, seed)


def _run_once(store: runs.Store, case: runs.Case, machine: dict[str, str]) -> None:
    """Run a case, unless a run with the same settings is kept."""
    kept = store.run(case)
    if kept is not None and kept.setting == case.setting:
        return
    with fresh_cache():  # what one run has compiled, the next one compiles again
        run = runs.train(case, machine)
    store.keep(run)
    sys.stdout.write(f"{case.file[:-5]}: {run.failure or f'{run.end:.3g}'}\n")
    sys.stdout.flush()


def write(store: runs.Store, out: Path) -> None:
    """Write the page and the figures from the kept runs."""
    kept = page.Results(store)
    figures.draw(kept, out / "figures")
    out.mkdir(parents=True, exist_ok=True)
    (out / "pinn.md").write_text(page.markdown(kept), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(app))
