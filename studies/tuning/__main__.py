"""The study of the settings: `python -m studies.tuning --data DIR`; docs/tuning.md is its page."""

from __future__ import annotations

from pathlib import Path

import torch
from cyclopts import App
from cyclopts.types import ResolvedExistingDirectory
from rich.console import Console

from studies import runs as default_runs
from studies.tuning import figures, page, runs
from studies.tuning.grid import PROBLEMS, SETTINGS, is_tried
from tengrad_triton.recipes.measuring.machine import describe

ROOT = Path(__file__).parent
app = App(name="studies.tuning", help=__doc__, help_format="plaintext")


@app.default
def study(
    *,
    data: ResolvedExistingDirectory | None = None,
    out: Path = ROOT.parents[1] / "docs",
    results: Path = ROOT / "results",
    report_only: bool = False,
) -> None:
    """Run what is missing, on one thread, and write the page and its figures.

    Parameters
    ----------
    data
        Folder with fashion_mnist/, which has train-*.parquet and test-*.parquet.
    out
        Folder of the page tuning.md; the figures go into its folder figures/.
    results
        Folder with a file of results for each problem.
    report_only
        Whether to write the page from the existing results, and to run nothing.
    """
    store = runs.Store(results)
    if not report_only:
        if data is None:
            raise ValueError("--data is missing: the folder with fashion_mnist/; or --report-only, which runs nothing")
        measure(store, data)
    write(store, out)


def measure(store: runs.Store, data: Path) -> None:
    """Run what is missing: all settings with the first seed, then with the next one."""
    torch.set_num_threads(1)
    # Asked once: the commit must be that of the loaded code.
    commit, console = str(describe(torch.device("cpu"))["commit"]), Console()
    for case in missing(store):
        run = runs.train(case, data, commit)
        store.keep(case, run)
        ending = run.failure or f"{run.loss[-1]:.4g}"
        console.print(f"{case.problem}, {run.key}, seed {run.seed}: {ending}", highlight=False)


def write(store: runs.Store, out: Path) -> None:
    """Write the page and the figures from the kept runs."""
    kept = page.Results(store, default_runs.Store(ROOT.parent / "results"))
    figures.draw(kept, out / "figures")
    (out / "tuning.md").write_text(page.markdown(kept, page.TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")


def missing(store: runs.Store) -> list[runs.Case]:
    """Return the cases that have no valid run."""
    seeds = sorted({seed for setting in SETTINGS for seed in setting.seeds})
    cases = (
        runs.Case(problem, setting, seed)
        for seed in seeds
        for setting in SETTINGS
        for problem in PROBLEMS
        if seed in setting.seeds and is_tried(setting, problem)
    )
    return [case for case in cases if store.run(case) is None]


if __name__ == "__main__":
    app()
