"""Ask a GPU what the benchmarks need to know: `python -m perf.gpu first --out DIR`, then `second`, in minutes each.

first    are the kernels right? what do steps consist of, how long do they and the kernels take, in which configuration?
second   steps with CUDA graphs, a race by training time, kernels against compiled expressions, memory
data     packs Fashion-MNIST's Parquet files for the second call

Each box of a call has its own time. It leaves results when that is up, and the next box runs whatever happened. DIR has
at most eight files then: results by suite, log.txt, and summary-CALL.json, which says how every task ended. With a copy
of DIR in perf/results/, `python -m perf --report-only` writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from perf.gpu import boxes
from perf.gpu.boxes import Box
from perf.gpu.calls import CALLS, Options
from perf.gpu.data import PACK, pack, unpack
from perf.gpu.summary import Summary
from tengrad_triton.recipes.errors import UsageError


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="first | second | data")
    for name in CALLS:
        call = commands.add_parser(name, help=f"the boxes of the {name} call")
        call.add_argument("--out", type=Path, required=True, help="folder of the results")
        call.add_argument("--data", type=Path, help=f"images of the race; `{PACK}` makes the file")
        call.add_argument("--only", nargs="+", metavar="BOX", help="boxes to run, in this order")
        call.add_argument("--seconds", type=float, help="time of all boxes together, in proportion to their own")
        call.add_argument("--commit", help="the commit of this tree; asked of git by default")
        call.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, in two minutes")
    packing = commands.add_parser("data", help="pack the images")
    packing.add_argument("folder", type=Path, help="folder of the data set, as tengrad-triton train --data takes it")
    packing.add_argument("path", type=Path, metavar="OUT.npz", help="file to write")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> tuple[Options, list[Box]]:
    """Return what the boxes have in common, and the boxes with their times.

    Raises:
        UsageError: the call cannot be carried out.
    """
    if not options.rehearse and not torch.cuda.is_available():
        raise UsageError("torch finds no GPU here: --rehearse runs all boxes on a CPU, at tiny sizes")
    if options.seconds is not None and options.seconds <= 0:
        raise UsageError(f"--seconds must be positive, got {options.seconds:g}")
    device = torch.device("cpu" if options.rehearse else "cuda")
    common = Options(device, options.out.resolve(), options.rehearse, options.data and options.data.resolve())
    known = {box.name: box for box in CALLS[options.command](common)}
    if unknown := [name for name in options.only or () if name not in known]:
        raise UsageError(f"--only {' '.join(unknown)}: the {options.command} call has {', '.join(known)}")
    found = [known[name] for name in options.only or known]
    if common.data is not None:
        unpack(common.data)
    elif not options.rehearse and any(box.name == "race" for box in found):
        raise UsageError(f"the race needs --data: make the file with `{PACK}`, or leave the race out with --only")
    factor = 1.0 if options.seconds is None else options.seconds / sum(box.seconds for box in found)
    return common, [replace(box, seconds=factor * box.seconds) for box in found]


def run(call: str, options: Options, found: Sequence[Box], commit: str | None) -> int:
    """Run the boxes one after the other; print the machine, and after each box what it found.

    Returns:
        The exit status: 1 if a task failed, else 0.
    """
    log = options.out / "log.txt"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be written ({error.strerror}): name another folder") from error
    summary = Summary(call, options.device, options.out, commit, found)
    print(summary.head(), *what_is_missing(options, found), sep="\n", flush=True)
    deadline = time.monotonic()
    for box in found:
        start = time.monotonic()
        deadline += box.seconds  # so that a box has the time that earlier ones have left
        tasks = boxes.run(box, deadline, log)
        summary.add(box, deadline - start, time.monotonic() - start, tasks)
        print("\n".join(summary.lines(box)), flush=True)
    return int(summary.has_failures)


def what_is_missing(options: Options, found: Sequence[Box]) -> Iterator[str]:
    """Yield a line for each reason for which tasks cannot run."""
    if options.device.type == "cuda" and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        yield "Triton needs a C compiler, and finds none: without gcc or clang every kernel fails"
    tasks: dict[str, list[str]] = {}
    for box in found:
        for task in box.tasks:
            if (why := task.why_not()) is not None:
                tasks.setdefault(why, []).append(f"{box.name} without {task.name}")
    yield from (f"{why}: {', '.join(names)}" for why, names in tasks.items())


def main() -> None:
    """Carry out the command. A request that cannot be carried out is one line on stderr, and exit status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the tasks of a stopped call end too
    options = parsed()
    try:
        if options.command == "data":
            data = pack(options.folder, options.path)
            print(f"{options.path}: {len(data.train)} training and {len(data.test)} test images, "
                  f"{os.path.getsize(options.path) / 1e6:.0f} MB")  # fmt: skip
        else:
            sys.exit(run(options.command, *chosen(options), options.commit))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
