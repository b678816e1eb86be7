"""Peak memory of a few training steps, each kind in a process of its own: `python -m perf.memory MODEL N OPTIMIZER`."""

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
from tengrad_triton.recipes.training.peak_memory import peak_pages
from tengrad_triton.tuning.plan import MAX_BYTES

STEPS = 3  # refresh, reuse, refresh: an old and a new curvature meet
OPTIMIZERS = ("sgd", "tengrad")


@dataclass(frozen=True)
class MemoryCase:
    """A model, a batch size, and a budget for J where there is one."""

    model: str
    samples: int
    max_bytes: int = MAX_BYTES

    def __str__(self) -> str:
        return f"memory of {self.model}, N = {self.samples}{within(self.max_bytes)}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return each optimizer's peak in bytes, and the ratio."""
        peaks = {name: self._in_a_process(name, device) for name in OPTIMIZERS}
        return {**asdict(self), "bytes": peaks, "over_sgd": peaks["tengrad"] / peaks["sgd"]}

    def _in_a_process(self, optimizer: str, device: torch.device) -> int:
        command = [
            sys.executable,
            "-m",
            "perf.memory",
            self.model,
            str(self.samples),
            optimizer,
            "--device",
            str(device),
            "--max-bytes",
            str(self.max_bytes),
        ]
        environment = {name: value for name, value in os.environ.items() if name not in KEEP_PAGES}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return json.loads(done.stdout)["bytes"]


def peak(model: str, samples: int, optimizer: str, device: torch.device, max_bytes: int) -> int:
    """Return the most bytes that were in use at once, beyond what was in use before the model was there.

    On a CPU these are the process's pages: what torch's own code takes is not part of it. On a GPU they are what torch
    has allocated.
    """
    made = MODELS[model]
    before = peak_pages() if device.type == "cpu" else 0
    x, y = made.batch(samples, device)
    step = _step(made.on(device), optimizer, max_bytes)
    for _ in range(STEPS):
        step(x, y)
    return peak_pages() - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


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
