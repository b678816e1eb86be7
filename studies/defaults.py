"""The study of TENGraD's defaults: `python -m studies.defaults --data DIR --out docs`; docs/defaults.md is its page."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App
from cyclopts.types import ResolvedExistingDirectory
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from studies import figures, page, runs, timing
from studies.problems import PROBLEMS
from studies.results import Results
from tengrad_triton.recipes.measuring.machine import describe

ROOT = Path(__file__).parent
ProblemName = Literal["mlp", "3c1f", "resnet", "vit", "pinn"]
app = App(name="studies.defaults", help=__doc__, help_format="plaintext")


@app.default
def study(
    *,
    data: ResolvedExistingDirectory,
    out: Path = ROOT.parent / "docs",
    results: Path = ROOT / "results",
    only: tuple[ProblemName, ...] = ("pinn", "vit", "mlp", "3c1f", "resnet"),
    measure: bool = True,
) -> None:
    """Run what is missing, on one thread; then write the page and its figures.

    Parameters
    ----------
    data
        Folder with fashion_mnist/ and cifar10/, each with train-*.parquet and test-*.parquet.
    out
        Folder of the page defaults.md; the figures go into its folder figures/.
    results
        Folder with a JSON file for each run.
    only
        The models to train.
    measure
        Whether to run what is missing; with --no-measure the page is written from the existing results.
    """
    store = runs.Store(results)
    if measure:
        torch.set_num_threads(1)
        _measure(store, data, only)
    write(store, out)


def _measure(store: runs.Store, data: Path, only: tuple[ProblemName, ...]) -> None:
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    machine = describe(torch.device("cpu"))  # asked once: the commit must be that of the loaded code
    with warnings.catch_warnings(), Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        warnings.filterwarnings("ignore", message="no exact rows for")  # the page names these parameters
        for stage, name in itertools.product(runs.STAGES, only):
            missing = [case for case in dict.fromkeys(stage(name, store)) if store.run(case) is None]
            for case in progress.track(missing, description=f"{name}, {stage.__name__}"):
                store.keep(runs.train(case, data, str(machine["commit"])))
                console.print(case.file, highlight=False)
            if store.read(f"{name}-timing.json") is None:
                store.write(f"{name}-timing.json", {"seconds": timing.step_seconds(name, data), "machine": machine})


def write(store: runs.Store, out: Path) -> None:
    """Write the page and the figures from the existing results."""
    results = Results(store)
    figures.draw(results, out / "figures")
    machine = next(store.read(f"{name}-timing.json")["machine"] for name in PROBLEMS if results.seconds(name))
    note = ROOT / "defaults.md"
    texts = {"summary": note.read_text(encoding="utf-8").strip()} if note.exists() else {}
    (out / "defaults.md").write_text(page.markdown(results, machine, texts), encoding="utf-8")


if __name__ == "__main__":
    app()
