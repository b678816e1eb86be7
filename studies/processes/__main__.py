"""What training in many processes sends, holds and takes; docs/scaling.md is its page."""

from __future__ import annotations

from pathlib import Path

import torch
from cyclopts import App
from rich.console import Console

from studies.processes import figures, page
from studies.processes.measured import count, exchange_seconds
from studies.processes.store import Store, machine
from studies.processes.times import TIMED, Host

ROOT = Path(__file__).parent
app = App(name="studies.processes", help=__doc__, help_format="plaintext")


@app.default
def study(*, out: Path = ROOT.parents[1] / "docs", results: Path = ROOT / "results", report_only: bool = False) -> None:
    """Measure what is missing, in up to eight processes of one thread each, and write the page and its figure.

    Parameters
    ----------
    out
        Folder of the page scaling.md; the figure goes into its folder figures/.
    results
        Folder with what was measured.
    report_only
        Whether to write the page from what was measured before, and to measure nothing.
    """
    store = Store(results)
    if not report_only:
        measure(store)
    write(store, out)


def measure(store: Store) -> None:
    """Count the bytes of all cases that are missing, and time the host if that is missing."""
    console, where = Console(), machine()  # asked once: the commit must be that of the loaded code
    for case in store.missing():
        store.keep_counted(count(case), where)
        console.print(f"{case.network}, {case.way}, {case.count} processes: counted", highlight=False)
    if store.host is None:
        torch.set_num_threads(1)
        store.keep_host(Host({name: exchange_seconds(name) for name in TIMED}), where)


def write(store: Store, out: Path) -> None:
    """Write the page and the figure."""
    figures.draw(store, out / "figures")
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.md").write_text(page.markdown(store, page.TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    app()
