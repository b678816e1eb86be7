"""The study of TENGraD's defaults: `python -m studies.defaults --data DIR --out docs`; docs/defaults.md is its page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from cyclopts.types import ResolvedExistingDirectory
from rich.console import Console

from studies import figures, page, runs, stages, timing
from studies.optimizers import NAMES
from studies.problems import PROBLEMS
from studies.results import Results
from tengrad_triton.recipes.measuring.machine import describe

ROOT = Path(__file__).parent
app = App(name="studies.defaults", help=__doc__, help_format="plaintext")


def _known(names: Sequence[str]) -> Any:
    """Return a check that every word of an option is one of some names."""

    def check(_: Any, words: Sequence[str]) -> None:
        unknown = [word for word in words if word not in names]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(names)}")

    return Parameter(validator=check, consume_multiple=True, negative=(), show_default=" ".join)


@app.default
def study(
    *,
    data: ResolvedExistingDirectory,
    out: Path = ROOT.parent / "docs",
    results: Path = ROOT / "results",
    only: Annotated[tuple[str, ...], _known(tuple(PROBLEMS))] = tuple(PROBLEMS),
    only_optimizer: Annotated[tuple[str, ...], _known(NAMES)] = NAMES,
    measure: bool = True,
    time: bool = True,
    page: bool = True,
) -> None:
    """Run what is missing, on one thread; then time the steps, and write the page and its figures.

    Parameters
    ----------
    data
        Folder with a folder for each of fashion-mnist and cifar10, which holds train-*.parquet and test-*.parquet.
    out
        Folder of the page defaults.md; the figures go into its folder figures/.
    results
        Folder with a JSON file for each run.
    only
        The problems to train and to time.
    only_optimizer
        The optimizers to train; the steps of all are timed together.
    measure
        Whether to run what is missing; with --no-measure the page is written from the existing results.
    time
        Whether to time the steps where that is missing; it needs a quiet machine.
    page
        Whether to write the page.
    """
    store = runs.Store(results)
    torch.set_num_threads(1)
    # Asked once: the commit must be that of the loaded code.
    machine = describe(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no exact rows for")  # the page names these parameters
        if measure:
            _measure(store, data, only, only_optimizer, str(machine["commit"]))
        if measure and time:
            _time(store, data, only, machine)
    if page:
        write(store, out)


def _measure(store: runs.Store, data: Path, only: Sequence[str], optimizers: Sequence[str], commit: str) -> None:
    console = Console()
    for name in only:
        for case in stages.missing(name, optimizers, store):
            run = runs.train(case, data, commit)
            store.keep(run)
            console.print(f"{case.file}: {run.failure or f'{run.loss[-1]:.4g}'}", highlight=False)


def _time(store: runs.Store, data: Path, only: Sequence[str], machine: dict[str, Any]) -> None:
    settings = {name: timing.settings(name) for name in only}
    stale = [name for name in only if (store.read(f"{name}-timing.json") or {}).get("settings") != settings[name]]
    passes = [{name: timing.turns(name, data) for name in stale} for _ in range(timing.PASSES)]
    for name in stale:
        seconds = timing.step_seconds(one[name] for one in passes)
        store.write(f"{name}-timing.json", {"seconds": seconds, "settings": settings[name], "machine": machine})


def write(store: runs.Store, out: Path) -> None:
    """Write the page and the figures from the existing results."""
    results = Results(store)
    figures.draw(results, out / "figures")
    note = ROOT / "defaults.md"
    texts = {"summary": note.read_text(encoding="utf-8").strip()} if note.exists() else {}
    (out / "defaults.md").write_text(page.markdown(results, texts), encoding="utf-8")


if __name__ == "__main__":
    app()
