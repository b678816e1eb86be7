"""What the library's defaults add to a step of SGD, and what they add within a budget, beside what the budget says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from perf.loops import Mode, sgd_step, tengrad_step
from perf.models import MODELS
from perf.steps import WARM_UP, sgd_timer, tengrad_timer
from perf.timing import interleaved, mean_step
from tengrad_triton import Growing, TENGraD

LR = 1e-6  # the weights hardly move: all steps do the same work


@dataclass(frozen=True)
class BudgetCase:
    """A model, a batch size, the number of rounds, what a step may take beyond SGD's, and the kind of loop."""

    model: str
    samples: int
    rounds: int
    step_share: float | None = None
    mode: Mode = "plain"

    def __str__(self) -> str:
        budget = "" if self.step_share is None else f", step_share={self.step_share:g}"
        return f"{self.model}, N = {self.samples}, {self.mode}, defaults{budget}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of SGD's steps and of TENGraD's, and what they add to SGD's, measured and said.

        The mean is over an interval of `Growing`, or the longer one that the budget asks for.

        Raises:
            ValueError: the budget leaves no row.
        """
        made = MODELS[self.model]
        x, y = made.batch(self.samples, device)
        block = 10 if device.type == "cuda" else 3
        model, plain = made.on(device), made.on(device)
        given: dict[str, Any] = {"step_share": self.step_share, "refresh_every": block + 2}
        optimizer = TENGraD(model, lr=LR, seed=0, verify="never", **given)
        timers = {
            "sgd": sgd_timer(sgd_step(plain, self.mode), block, x, y),
            "tengrad": tengrad_timer(tengrad_step(model, optimizer, self.mode), block, x, y),
        }
        for _ in range(WARM_UP[self.mode]):
            for timer in timers.values():
                timer()
        times = interleaved(timers, self.rounds)
        spending = optimizer.summary().spending
        assert spending is not None
        sgd, refresh, first, reuse = (times[name]["median"] for name in ("sgd", "refresh", "first", "reuse"))
        every = max(Growing().most, spending.interval)
        return {
            **asdict(self),
            "seconds": times,
            "measured": {
                "step": reuse / sgd - 1,
                "refresh": (refresh + first - 2 * reuse) / sgd,
                "mean": mean_step(refresh + first - reuse, reuse, every) / sgd - 1,
                "every 10th": mean_step(refresh + first - reuse, reuse, 10) / sgd - 1,
            },
            "said": {
                "step": spending.step,
                "refresh": spending.refresh,
                "mean": spending.step + spending.refresh / every,
            },
            "rows": [spending.rows, spending.of],
            "every": every,
            "kept_bytes": sum(parameter.bytes for parameter in optimizer.summary().parameters),
        }
