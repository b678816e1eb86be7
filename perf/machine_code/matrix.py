"""Every launch configuration, compiled for every architecture with the installed Triton."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from perf.machine_code.compiler import resources
from perf.machine_code.configurations import configurations
from perf.machine_code.gpus import ARCHITECTURES
from perf.machine_code.resources import Matrix


def compiled(processes: int | None = None) -> Matrix:
    """Compile every configuration with the installed Triton in parallel processes."""
    names = {target: list(configurations(architecture)) for target, architecture in ARCHITECTURES.items()}
    # A process that is forked from one with threads may hang; triton and torch have some.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), context) as pool:
        found = {target: pool.map(resources, names[target], repeat(target)) for target in ARCHITECTURES}
        return {target: dict(zip(names[target], found[target], strict=True)) for target in ARCHITECTURES}
