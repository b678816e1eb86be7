"""Runs suites: a line for each case, results after each case, and no new case once the time is up."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from perf.record import ROOT, Suite
from perf.selection import Case, Selection

BENCHMARKS = ROOT / "perf" / "bench_kernels.py"


def run(selection: Selection, only: Sequence[str], device: torch.device, folder: Path, seconds: float) -> None:
    """Run the suites in ``only``, and write a file for each into ``folder``."""
    deadline = time.monotonic() + seconds
    if "kernels" in only:
        _run_kernels(selection, device, folder, seconds)
    suites = {name: Suite(name, device, folder) for name in only if name != "kernels"}
    for name, suite in suites.items():
        for case, why in selection.skipped.get(name, {}).items():
            suite.skip(case, why)
    for name, case in _in_turn({name: selection.suites[name] for name in suites}):
        _run_case(suites[name], name, case, device, deadline)


def _in_turn(suites: Mapping[str, Sequence[Case]]) -> Iterator[tuple[str, Case]]:
    """Yield the first case of every suite, then the second ones, so that every suite has its most important cases."""
    for cases in zip_longest(*suites.values()):
        yield from ((name, case) for name, case in zip(suites, cases, strict=True) if case is not None)


def _run_case(suite: Suite, name: str, case: Case, device: torch.device, deadline: float) -> None:
    start = time.monotonic()
    if start > deadline:
        suite.skip(str(case), "out of time")
        return
    print(f"{name}: {case} ... ", end="", flush=True)
    try:
        suite.add(case.measure(device))
        print(f"{time.monotonic() - start:.1f} s", flush=True)
    except (RuntimeError, MemoryError, subprocess.CalledProcessError) as error:  # the other cases may still succeed
        suite.skip(str(case), f"failed with {type(error).__name__}")
        print(f"{type(error).__name__}: {error}", flush=True)
    _make_room(device)


def _make_room(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run_kernels(selection: Selection, device: torch.device, folder: Path, seconds: float) -> None:
    """Run pytest-benchmark in a process of its own; its JSON is the result file."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "kernels.json"
    options = {
        "benchmark-json": result,
        "scale": selection.scale,
        "rounds": selection.kernel_rounds,
        "device": device,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    command = [
        *(sys.executable, "-m", "pytest", str(BENCHMARKS), "-v", "-p", "no:cacheprovider", "-W", "default"),
        *("--no-header", "--no-summary", "--benchmark-quiet"),
        *(f"--{name}={value}" for name, value in options.items()),
        *(["--compiled"] if selection.compiled else []),
    ]
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        child.wait()
    except KeyboardInterrupt:  # the child process has it too, and ends
        child.wait()
    if child.returncode:
        print(f"kernels: pytest ended with {child.returncode}: {result.name} holds what was measured", flush=True)
