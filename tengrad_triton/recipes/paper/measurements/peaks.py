"""The peak memory of an optimizer's steps, which each optimizer takes in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from tengrad_triton.recipes.training import peak_memory

MODULE = peak_memory.__name__


def peak(case: Mapping[str, Any]) -> int:
    """Return the peak memory of an optimizer's steps in bytes; ``case`` is that of `peak_memory.peak_of_steps`."""
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(command, input=json.dumps(case), check=True, stdout=subprocess.PIPE, text=True)
    found: int = json.loads(done.stdout)["bytes"]
    return found


def seconds_to_start() -> float:
    """Return the seconds until such a process has imported what it needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {MODULE}"], check=True)
    return time.perf_counter() - start
