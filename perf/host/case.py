"""The host's time of a reuse step over that of SGD's step, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perf.record import ROOT


@dataclass(frozen=True)
class HostCase:
    """A model by its name in `measure.MODELS`, and the number of rounds."""

    model: str
    rounds: int

    def __str__(self) -> str:
        return f"host time of {self.model}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return spreads of both steps in seconds, their ratio, and the kernels launched in a reuse step."""
        command = [sys.executable, "-m", "perf.host.measure", self.model, str(self.rounds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        return {**asdict(self), **json.loads(done.stdout)}
