"""The boxes of the two calls, in their order: what matters most first, because the last ones run only if there is time.

`first` asks whether the kernels are right, and where the time goes. `second` comes after the repairs: steps with CUDA
graphs, and a race by training time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from perf.gpu.boxes import Box, Task
from perf.selection import GPU, QUICK, TARGETED, Selection
from perf.suites import kernels_command
from tengrad_triton.kernels import SPECS

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Without the plugins that happen to be installed, pytest begins sooner, and none of them can fail."""


@dataclass(frozen=True)
class Options:
    """What the boxes of a call have in common. A rehearsal has tiny sizes, and runs on a CPU."""

    device: torch.device
    out: Path
    rehearse: bool
    data: Path | None

    @property
    def selection(self) -> Selection:
        """The cases of the suites."""
        return QUICK if self.rehearse else GPU


def first(options: Options) -> tuple[Box, ...]:
    """Return the boxes of the first call: 315 seconds."""
    selection = replace(options.selection, compiled=False, kernel_rounds=min(5, options.selection.kernel_rounds))
    return (
        Box("right", 85, (*_tests(options), _piece("smoke", options), _memory_check(options)), ("smoke",)),
        Box("trace", 40, (_piece("trace", options),), ("trace",)),
        Box("steps", 80, (_suite("steps", options, "--modes", "plain"),), ("steps",)),
        Box("kernels", 62, (_kernels(options, selection),), ("kernels",)),
        Box("variants", 48, (_piece("variants", options),), ("variants",)),
    )


def second(options: Options) -> tuple[Box, ...]:
    """Return the boxes of the second call: 400 seconds.

    While the tests run, the compiled steps are compiled for the first time: torch and Triton keep what they compile, so
    that the steps' box has more time to measure.
    """
    data = [] if options.data is None else ["--data", str(options.data)]
    right = (*_tests(options), _piece("smoke", options), *_compiling(options))
    return (
        Box("right", 45, right, ("smoke",)),
        Box("steps", 130, (_suite("steps", options),), ("steps",)),
        Box("race", 130, (_piece("race", options, *data, packages=("numpy",)),), ("race",)),
        Box("kernels", 75, (_kernels(options, options.selection),), ("kernels",)),
        Box("memory", 20, (_suite("memory", options),), ("memory",)),
    )


CALLS: Mapping[str, Callable[[Options], Sequence[Box]]] = {"first": first, "second": second}


def _tests(options: Options) -> Iterator[Task]:
    """Yield the kernels' tests: a process for each op, so that a fault of one kernel costs no other's tests."""
    quiet = ["-v", "--no-header", "-p", "no:cacheprovider", "-W", "default"]
    for name, chosen in ({"costs": "costs"} if options.rehearse else _shards()).items():
        line = ["-m", "pytest", "tests/test_kernels.py", *quiet, "-k", chosen]
        yield Task(
            f"tests: {name}",
            lambda _, line=line: line,
            packages=("pytest",),
            environment=NO_PLUGINS,
        )


def _shards() -> dict[str, str]:
    """Return disjoint selections of tests, which together have all tests: the rows of each op, and the other tests."""
    rows = {spec.name: f"[{spec.name}- or [{spec.name}]" for spec in SPECS}
    return rows | {"others": " and ".join(f"not ({row})" for row in rows.values())}


def _memory_check(options: Options) -> Task:
    """Return the task that looks for accesses outside of the tensors' memory, by NVIDIA's compute-sanitizer."""
    check = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    chosen = ["tests/test_kernels.py", "-q", "-x", "-p", "no:cacheprovider", "-W", "default"]
    names = ["-k", "test_kernel_is_as_exact_as_torch and float32"]
    # torch's allocator hands out parts of large blocks, within which nothing is outside.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **NO_PLUGINS}
    return Task(
        "memory check",
        lambda _: [*check, *chosen, *names],
        python=False,
        packages=("pytest",),
        program="compute-sanitizer",
        impossible="there is no GPU to check" if options.device.type == "cpu" else None,
        environment=environment,
    )


def _compiling(options: Options) -> Iterator[Task]:
    """Yield a process for each model of the targets, whose compiled steps are compiled."""
    models = {"tiny 3C1F": 8} if options.rehearse else dict.fromkeys(TARGETED, 128)
    for model, samples in models.items():
        command = ["-m", "perf.gpu.pieces.compiling", model, str(samples), "--device", str(options.device)]
        line = [*command, *(["--quick"] if options.rehearse else [])]
        yield Task(f"compiling {model}", lambda _, line=line: line)


def _common(options: Options, seconds: float) -> list[str]:
    place = ["--device", str(options.device), "--out", str(options.out), "--seconds", f"{seconds:.1f}"]
    return [*place, *(["--quick"] if options.rehearse else [])]


def _piece(name: str, options: Options, *more: str, packages: Sequence[str] = ()) -> Task:
    command = ["-m", "perf.gpu.pieces", name, *more]
    return Task(name, lambda seconds: [*command, *_common(options, seconds)], packages=packages, resumes=True)


def _suite(name: str, options: Options, *more: str) -> Task:
    command = ["-m", "perf", "--no-page", "--only", name, *more]
    return Task(name, lambda seconds: [*command, *_common(options, seconds)], resumes=True)


def _kernels(options: Options, selection: Selection) -> Task:
    command = partial(kernels_command, selection, options.device, options.out)
    plugin = ["-p", "pytest_benchmark.plugin"]
    packages = ("pytest", "pytest_benchmark")
    return Task("kernels", lambda seconds: [*command(seconds), *plugin], packages=packages, environment=NO_PLUGINS)
