"""Run the benchmarks that fit this machine, and write the page: `python -m perf [--quick] [--only SUITE ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch

from perf import record, suites
from perf.loops import Mode
from perf.selection import CPU, GPU, QUICK, SUITES


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check within a minute that everything runs"
    )
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", type=torch.device, help="cpu or cuda; the GPU by default, if there is one")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; perf/results/DEVICE by default, runs/perf/DEVICE with --quick"
    )
    parser.add_argument("--seconds", type=float, default=660, help="start no case later than this; 660 by default")
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), help="kinds of loops in the steps' suite")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that the result files hold")
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument("--report-only", action="store_true", help="write the page from the existing results")
    return parser.parse_args()


def main() -> None:
    """Run the suites and write docs/performance.md, or performance.md beside the folder of the results with --out."""
    options = parsed()
    record.keep_pages()
    torch.set_num_threads(1 if options.quick else torch.get_num_threads())
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = record.ROOT / "runs" / "perf" if options.quick else record.RESULTS
    out = options.out or results / record.slug(record.described(device))
    selection = QUICK if options.quick else GPU if device.type == "cuda" else CPU
    selection = selection.in_modes(options.modes) if options.modes else selection
    if not options.report_only:
        suites.run(selection, options.only, device, out, options.seconds, options.resume)
    if not options.no_page:
        from perf import report  # noqa: PLC0415 - a GPU machine need not have matplotlib

        page = record.ROOT / "docs" if out.parent == record.RESULTS else out.parent
        report.generate(out.parent, page / "performance.md")
        print(f"performance.md: generated from {out.parent.name}/")


if __name__ == "__main__":
    main()
