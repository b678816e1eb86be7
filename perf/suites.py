"""Runs suites: a line for each case, results after each case, and no new case once the time is up."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from perf.record import ROOT, Suite, without_places
from perf.selection import Case, Selection

BENCHMARKS = ROOT / "perf" / "bench_kernels.py"
DEVICE_LOST = 75
"""The exit status of a process whose GPU refuses all work after a fault: a new process can run the other cases."""


def run(
    selection: Selection,
    only: Sequence[str],
    device: torch.device,
    folder: Path,
    seconds: float,
    resume: bool = False,
) -> None:
    """Run the suites in ``only``, and write a file for each into ``folder``; `run_cases` explains ``resume``."""
    deadline = time.monotonic() + seconds
    gc.freeze()  # what has been imported stays: the collections around each case need not look at it
    if "kernels" in only:
        _run_kernels(selection, device, folder, seconds)
    suites = {name: Suite(name, device, folder, resume) for name in only if name != "kernels"}
    for name, suite in suites.items():
        for case, why in selection.skipped.get(name, {}).items():
            if case not in suite.done:
                suite.skip(case, why)
    for name, case in _in_turn({name: selection.suites[name] for name in suites}):
        _run_case(suites[name], name, case, device, deadline)


def run_cases(
    name: str, cases: Iterable[Case], device: torch.device, folder: Path, seconds: float, resume: bool = False
) -> None:
    """Run one suite whose cases take about the same time: none begins that could not end within ``seconds``.

    With ``resume`` the file of the suite is continued: cases that it holds are left out.
    """
    deadline = time.monotonic() + seconds
    gc.freeze()
    suite, longest = Suite(name, device, folder, resume), 0.0
    for case in cases:
        start = time.monotonic()
        _run_case(suite, name, case, device, deadline - longest)
        longest = max(longest, time.monotonic() - start)


def _in_turn(suites: Mapping[str, Sequence[Case]]) -> Iterator[tuple[str, Case]]:
    """Yield the first case of every suite, then the second ones, so that every suite has its most important cases."""
    for cases in zip_longest(*suites.values()):
        yield from ((name, case) for name, case in zip(suites, cases, strict=True) if case is not None)


def _run_case(suite: Suite, name: str, case: Case, device: torch.device, deadline: float) -> None:
    """Run one case. Whatever it raises is noted, because the other cases may still succeed."""
    start = time.monotonic()
    if str(case) in suite.done:
        return
    if start > deadline:
        suite.skip(str(case), "out of time")
        return
    print(f"{name}: {case} ... ", end="", flush=True)
    try:
        suite.add(str(case), case.measure(device))
        print(f"{time.monotonic() - start:.1f} s", flush=True)
    except Exception as error:
        reason = without_places(str(error)).partition("\n")[0][:200]
        suite.skip(str(case), f"failed with {type(error).__name__}: {reason}")
        print(f"{type(error).__name__}: {reason}", flush=True)
        traceback.print_exc()
        if not works(device):
            print("the GPU refuses all work after this fault: the other cases need a new process", flush=True)
            os._exit(DEVICE_LOST)  # what Python does at its end would wait for the GPU
    _make_room(device)


def works(device: torch.device) -> bool:
    """Return whether the device still computes: after an invalid access to memory, a GPU refuses all work."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _make_room(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernels_command(selection: Selection, device: torch.device, folder: Path, seconds: float) -> list[str]:
    """Return the command that measures the kernels with pytest-benchmark; its JSON is the result file."""
    options = {
        "benchmark-json": folder / "kernels.json",
        "scale": selection.scale,
        "rounds": selection.kernel_rounds,
        "device": device,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    return [
        *("-m", "pytest", str(BENCHMARKS), "-v", "-p", "no:cacheprovider", "-W", "default"),
        *("--no-header", "--no-summary", "--benchmark-quiet"),
        *(f"--{name}={value}" for name, value in options.items()),
        *(["--compiled"] if selection.compiled else []),
    ]


def _run_kernels(selection: Selection, device: torch.device, folder: Path, seconds: float) -> None:
    """Run pytest-benchmark in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen([sys.executable, *kernels_command(selection, device, folder, seconds)], cwd=ROOT)
    try:
        child.wait()
    except KeyboardInterrupt:  # the child process has it too, and ends
        child.wait()
    if child.returncode:
        print(f"kernels: pytest ended with {child.returncode}: kernels.json holds what was measured", flush=True)
