"""Compiles the steps that the steps' suite times with CUDA graphs: torch and Triton keep the results on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perf.loops import Mode, sgd_step, tengrad, tengrad_step
from perf.models import MODELS
from tengrad_triton.recipes.measuring.machine import now


@dataclass(frozen=True)
class CompilingCase:
    """A model, a batch size and a kind of loop."""

    model: str
    samples: int
    mode: Mode

    def __str__(self) -> str:
        return f"{self.model}, N = {self.samples}, {self.mode}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the seconds of the first steps, in which everything is compiled, and why steps were plain."""
        made = MODELS[self.model]
        x, y = made.batch(self.samples, device)
        start = now(device)
        model = made.on(device)
        ours = tengrad_step(model, tengrad(model, 2), self.mode)
        for step in (sgd_step(made.on(device), self.mode), ours):
            for _ in range(3):  # a plain step, and the first of each compiled kind
                step(x, y)
        why = getattr(ours, "why_plain", None)
        return {**asdict(self), "seconds": now(device) - start, "why_plain": why and str(why)}


def cases(quick: bool) -> Iterator[CompilingCase]:
    """Yield the cases; on a CPU plain steps, because compiling them would take longer than the whole rehearsal."""
    if quick:
        yield CompilingCase("tiny 3C1F", 8, "plain")
        return
    for model in ("ResNet-18", "WRN-28-4", "3C1F"):
        yield CompilingCase(model, 128, "cuda graphs")
