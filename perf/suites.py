"""Runs suites: a progress line a case, results after every case, and no case begun after the time is up."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from perf.record import ROOT, Suite
from perf.selection import Selection

BENCHMARKS = ROOT / "perf" / "bench_kernels.py"


def run(selection: Selection, only: Sequence[str], device: torch.device, folder: Path, seconds: float) -> None:
    """Run the suites named, and write one file each into ``folder``."""
    start = time.monotonic()
    for name in only:
        if name == "kernels":
            _run_kernels(selection, device, folder, start + seconds - time.monotonic())
        else:
            _run_suite(name, selection, device, folder, start + seconds)


def _run_suite(name: str, selection: Selection, device: torch.device, folder: Path, deadline: float) -> None:
    suite = Suite(name, device, folder)
    for case, why in selection.skipped.get(name, {}).items():
        suite.skip(case, why)
    for case in selection.suites[name]:
        start = time.monotonic()
        if start > deadline:
            suite.skip(str(case), "out of time")
            continue
        print(f"{name}: {case} ... ", end="", flush=True)
        try:
            suite.add(case.measure(device))
            print(f"{time.monotonic() - start:.1f} s", flush=True)
        except (RuntimeError, MemoryError, subprocess.CalledProcessError) as error:  # of this case; others may do
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
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        print(f"kernels: pytest ended with {done.returncode}: {result.name} holds what was measured", flush=True)
