"""What the study runs: a `Setting` for each change, and the problems that it is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tengrad_triton.optim.damping import LevenbergMarquardt
from tengrad_triton.optim.interval import Growing

PROBLEMS = ("mlp", "3c1f", "pinn")
SEEDS = (0, 1)
Method = Literal["tengrad", "unscaled", "paper", "adamw"]


def _linear(done: float) -> float:
    return 1 - done


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "cooldown": lambda done: min(1.0, (1 - done) / 0.3),
}
"""From the share of the steps that are taken to what multiplies the learning rate."""


@dataclass(frozen=True)
class Setting:
    """A row of the study. All that is not said is as in `BASE`.

    Attributes:
        section: the part of the page that it belongs to.
        name: unique within its section.
        method: which settings it starts from: those of `TENGraD`, `TENGraD.unscaled`, `TENGraD.paper` or AdamW.
        factor: multiplies the method's learning rate.
        schedule: of the learning rate, in `SCHEDULES`.
        warmup: the share of the steps in which the learning rate rises from 0.
        change: settings of the optimizer.
        likelihood: that is said in place of the right one; empty for the right one.
        sums: whether the loss is the sum over the samples of a batch, not their mean.
        batch: multiplies the samples of a batch, and divides the number of steps.
        clip_grad: the norm that gradients are clipped to before the step; 0 for none.
        seeds: the seeds that it is run with.
    """

    section: str
    name: str
    method: Method = "tengrad"
    factor: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    change: Mapping[str, Any] = field(default_factory=dict)
    likelihood: str = ""
    sums: bool = False
    batch: float = 1.0
    clip_grad: float = 0.0
    seeds: tuple[int, ...] = SEEDS

    @property
    def key(self) -> str:
        """The name of the setting in the results."""
        return f"{self.section}: {self.name}"

    def rate(self, step: int, steps: int) -> float:
        """Return what multiplies the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else 1.0
        return rising * SCHEDULES[self.schedule](step / steps)


FACTORS = (0.1, 0.33, 1.0, 3.0, 10.0)
ADAMW_FACTORS = (1.0, 3.0, 10.0)
REGIONS: tuple[float | None, ...] = (3e-4, 3e-3, 3e-2, None)
MANY = (0, 1, 2)


def _rates() -> list[Setting]:
    found = [
        Setting("rate", f"{schedule} {factor:g}", factor=factor, schedule=schedule, seeds=MANY)
        for schedule in ("linear", "constant")
        for factor in FACTORS
    ]
    found += [Setting("rate", f"cosine {factor:g}", factor=factor, schedule="cosine") for factor in FACTORS[1:-1]]
    return [*found, Setting("rate", "cooldown 1", schedule="cooldown")]


def _adamw() -> list[Setting]:
    return [
        Setting("adamw", f"{schedule} {factor:g}", "adamw", factor, schedule, seeds=MANY)
        for schedule in ("linear", "constant")
        for factor in ADAMW_FACTORS
    ]


def _unscaled() -> list[Setting]:
    return [
        Setting("unscaled", f"{schedule} {region}", "unscaled", schedule=schedule, change={"trust_region": region})
        for schedule in ("linear", "constant")
        for region in REGIONS
    ]


def _changes(section: str, changes: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    return [Setting(section, name, change=change) for name, change in changes.items()]


BASE = Setting("rate", "linear 1", seeds=MANY)
"""What every other setting is compared with: `TENGraD(model)`, whose learning rate falls to zero on a line."""
SETTINGS: tuple[Setting, ...] = (
    *_rates(),
    *_adamw(),
    *_unscaled(),
    *_changes("damping", {f"{d:g}": {"damping": d} for d in (1.0, 3.0, 30.0, 100.0)}),
    Setting("damping", "adapted", change={"damping": LevenbergMarquardt(start=10.0)}),
    *_changes("rows", {"16": {"fisher_rows": 16}, "64": {"fisher_rows": 64}, "four draws": {"fisher_samples": 4}}),
    *_changes("rows", {"empirical": {"fisher": "empirical"}}),
    *_changes("interval", {"1": {"refresh_every": 1}, "at most 5": {"refresh_every": Growing(5)}}),
    *_changes("interval", {"at most 100": {"refresh_every": Growing(100)}, "100": {"refresh_every": 100}}),
    *_changes("momentum", {f"{m:g}": {"momentum": m} for m in (0.0, 0.5, 0.95)}),
    *_changes("momentum", {"no look-ahead": {"nesterov": False}}),
    *_changes("weight decay", {f"{d:g}": {"weight_decay": d} for d in (0.1, 1.0)}),
    *_changes("clip_threshold", {"0.3": {"clip_threshold": 0.3}, "None": {"clip_threshold": None}}),
    Setting("warm-up", "linear 1", warmup=0.1),
    Setting("warm-up", "linear 3", factor=3.0, warmup=0.1),
    Setting("batch", "quarter", batch=0.25),
    Setting("batch", "quarter, half the rate", batch=0.25, factor=0.5),
    Setting("batch", "four times", batch=4.0),
    Setting("batch", "four times, twice the rate", batch=4.0, factor=2.0),
    *(Setting("loss", name, likelihood=name) for name in ("categorical", "gaussian", "bernoulli")),
    Setting("loss", "sum", sums=True),
    Setting("loss", "gradients clipped", clip_grad=1.0),
    Setting("paper", "constant", "paper", schedule="constant"),
    Setting("rows", "bfloat16", change={"representation": "per_sample_bf16"}, seeds=(0,)),  # slow on many CPUs
)
