"""What the study runs: a `Setting` for each change, and the problems that it is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tengrad_triton.optim.damping import LevenbergMarquardt
from tengrad_triton.optim.interval import Growing

PROBLEMS = ("mlp", "3c1f", "pinn")
SEEDS = (0, 1)
MORE = {
    "tengrad: linear 3",
    "tengrad: linear 1",
    "adamw: linear 3",
    "unscaled: linear 0.0003",
    "unscaled: linear 0.003",
}
"""Settings whose comparison decides an advice: they have a third seed."""
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
    """A row of the study. What is not said is as in `BASE`.

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
        only_first: whether it is run with the first seed alone.
    """

    section: str
    name: str
    method: Method = "tengrad"
    factor: float = 3.0
    schedule: str = "linear"
    warmup: float = 0.0
    change: Mapping[str, Any] = field(default_factory=dict)
    likelihood: str = ""
    sums: bool = False
    batch: float = 1.0
    clip_grad: float = 0.0
    only_first: bool = False

    @property
    def key(self) -> str:
        """The name of the setting in the results."""
        return f"{self.section}: {self.name}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that it is run with."""
        return SEEDS[:1] if self.only_first else (*SEEDS, len(SEEDS)) if self.key in MORE else SEEDS

    def rate(self, step: int, steps: int) -> float:
        """Return what multiplies the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else 1.0
        return rising * SCHEDULES[self.schedule](step / steps)


RATE = 3.0
"""The multiple of TENGraD's learning rate that the changes of other settings are tried with."""
REGIONS: tuple[float | None, ...] = (3e-4, 3e-3, 3e-2, None)


def _rates(method: Method, tried: Mapping[str, Sequence[float]]) -> list[Setting]:
    return [
        Setting(method, f"{schedule} {factor:g}", method, factor, schedule)
        for schedule, factors in tried.items()
        for factor in factors
    ]


def _unscaled() -> list[Setting]:
    return [
        Setting("unscaled", f"{schedule} {region}", "unscaled", 1.0, schedule, change={"trust_region": region})
        for schedule, regions in (("linear", REGIONS), ("constant", REGIONS[:2]))
        for region in regions
    ]


def _changes(section: str, changes: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    return [Setting(section, name, change=change) for name, change in changes.items()]


BASE = Setting("tengrad", "linear 3")
"""What the changes are compared with: `TENGraD(model, lr=0.03)`, whose learning rate falls to zero on a line."""
SETTINGS: tuple[Setting, ...] = (
    *_rates("tengrad", {"linear": (3.0, 1.0, 0.33, 10.0), "cosine": (3.0,), "cooldown": (3.0,)}),
    *_unscaled(),
    *_rates("adamw", {"linear": (3.0, 10.0)}),
    *(Setting("loss", name, likelihood=name) for name in ("gaussian", "bernoulli", "categorical")),
    Setting("loss", "sum", sums=True),
    *_changes("damping", {f"{d:g}": {"damping": d} for d in (1.0, 3.0, 30.0)}),
    *_changes("rows", {"16": {"fisher_rows": 16}, "empirical": {"fisher": "empirical"}, "exact": {"fisher": "exact"}}),
    *_changes("interval", {"1": {"refresh_every": 1}, "at most 100": {"refresh_every": Growing(100)}}),
    Setting("batch", "four times", batch=4.0),
    Setting("batch", "four times, twice the rate", factor=2 * RATE, batch=4.0),
    Setting("batch", "quarter", batch=0.25),
    Setting("batch", "quarter, half the rate", factor=RATE / 2, batch=0.25),
    Setting("damping", "adapted", change={"damping": LevenbergMarquardt(start=10.0)}),
    *_changes("momentum", {"0": {"momentum": 0.0}, "no look-ahead": {"nesterov": False}}),
    Setting("warm-up", "a tenth", warmup=0.1),
    *_changes("weight decay", {"0.1": {"weight_decay": 0.1}}),
    *_changes("bound", {"None": {"clip_threshold": None}}),
    Setting("gradients", "clipped", clip_grad=1.0),
    Setting("paper", "constant", "paper", 1.0, "constant"),
    Setting("rows", "bfloat16", change={"representation": "per_sample_bf16"}, only_first=True),
)
ONLY = {"loss: categorical": ("pinn",), "loss: gaussian": ("mlp", "3c1f"), "rows: exact": ("pinn",)}
"""Where a setting is tried, if not on all problems: a likelihood where it is wrong, a row for each output where that is
one row for each sample."""
ONLY["rows: bfloat16"] = ("3c1f", "pinn")  # without instructions for bfloat16 a CPU takes minutes for the perceptron


def is_tried(setting: Setting, problem: str) -> bool:
    """Whether a setting is one for a problem."""
    return problem in ONLY.get(setting.key, PROBLEMS)
