"""What it costs to compare rows with autograd: refreshes with each setting of ``verify=``, and steps that reuse J."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from perf.loops import tengrad, tengrad_step
from perf.models import MODELS
from perf.timing import Timer, interleaved
from tengrad_triton.capture.rows.attribution import Verify
from tengrad_triton.recipes.measuring.machine import now

WARM_UP = 3
"""Rounds before the first: with ``verify="change"`` the first two refreshes compare rows, and the third does not."""


@dataclass(frozen=True)
class ProofCase:
    """A model, a batch size, and the number of rounds."""

    model: str
    samples: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.model}, N = {self.samples}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of refresh and reuse steps for each ``verify``, and their medians over those of never.

        ``"change"`` is timed where nothing has changed, so that no rows are compared; so is each first refresh.
        """
        timers = {verify: self._timer(verify, device) for verify in get_args(Verify)}
        firsts = {f"first refresh, {verify}": timer() for verify, timer in timers.items()}
        for _ in range(WARM_UP - 1):
            for timer in timers.values():
                timer()
        times = interleaved(timers, self.rounds)
        medians = {name: spread["median"] for name, spread in times.items()}
        over = {
            f"{kind}, {verify}": medians[f"{kind}, {verify}"] / medians[f"{kind}, never"]
            for kind in ("refresh", "reuse")
            for verify in ("change", "always")
        }
        first = {name: found[name.removeprefix("first ")] for name, found in firsts.items()}
        return {**asdict(self), "seconds": times, "over_never": over, "first_seconds": first}

    def _timer(self, verify: Verify, device: torch.device) -> Timer:
        made = MODELS[self.model]
        x, y = made.batch(self.samples, device)
        model = made.on(device)
        step = tengrad_step(model, tengrad(model, 2, verify=verify), "plain")

        def timer() -> dict[str, float]:
            start = now(device)
            step(x, y)
            middle = now(device)
            step(x, y)
            return {f"refresh, {verify}": middle - start, f"reuse, {verify}": now(device) - middle}

        return timer
