"""Peak memory of a few training steps, in a process for each optimizer: `python -m perf.memory MODEL N OPTIMIZER`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from perf.loops import Step, sgd_step, tengrad, tengrad_step, within
from perf.models import MODELS
from perf.record import KEEP_PAGES
from tengrad_triton.recipes.measuring.memory import peak_process_bytes
from tengrad_triton.tuning.plan import MAX_BYTES

STEPS = 3  # refresh, reuse, refresh: the old and the new curvature are in memory together
OPTIMIZERS = ("sgd", "tengrad")


@dataclass(frozen=True)
class MemoryCase:
    """A model, a batch size, and a budget for J in bytes."""

    model: str
    samples: int
    max_bytes: int = MAX_BYTES

    def __str__(self) -> str:
        return f"memory of {self.model}, N = {self.samples}{within(self.max_bytes)}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the peak of each optimizer in bytes, and TENGraD's over SGD's."""
        peaks = {name: self._in_a_process(name, device) for name in OPTIMIZERS}
        return {**asdict(self), "bytes": peaks, "over_sgd": peaks["tengrad"] / peaks["sgd"]}

    def _in_a_process(self, optimizer: str, device: torch.device) -> int:
        case = [self.model, str(self.samples), optimizer, "--device", str(device), "--max-bytes", str(self.max_bytes)]
        command = [sys.executable, "-m", "perf.memory", *case]
        environment = {name: value for name, value in os.environ.items() if name not in KEEP_PAGES}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return json.loads(done.stdout)["bytes"]


def peak(model: str, samples: int, optimizer: str, device: torch.device, max_bytes: int) -> int:
    """Return the peak in bytes, minus what was in use before the model was built.

    On a CPU the peak is that of the process, and torch's own code does not count; on a GPU, what torch has allocated.
    """
    made = MODELS[model]
    before = peak_process_bytes() if device.type == "cpu" else 0
    x, y = made.batch(samples, device)
    step = _step(made.on(device), optimizer, max_bytes)
    for _ in range(STEPS):
        step(x, y)
    return peak_process_bytes() - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _step(model: nn.Module, optimizer: str, max_bytes: int) -> Step:
    if optimizer == "sgd":
        return sgd_step(model, "plain")
    return tengrad_step(model, tengrad(model, 2, max_bytes), "plain")


def main() -> None:
    """Measure one peak and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("samples", type=int)
    parser.add_argument("optimizer", choices=OPTIMIZERS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES)
    o = parser.parse_args()
    print(json.dumps({"bytes": peak(o.model, o.samples, o.optimizer, o.device, o.max_bytes)}))


if __name__ == "__main__":
    main()
