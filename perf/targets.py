"""The targets of the project, and whether the results meet them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from perf.gpu.outcomes import error_of_defaults, times_to_sgds_best
from perf.loops import within
from perf.results import Device
from perf.selection import BUDGET
from tengrad_triton.tuning.plan import MAX_BYTES

Measure = Callable[[Device], float | None]


@dataclass(frozen=True)
class Target:
    """A bound of a quantity on one kind of machine; ``most`` says whether it is an upper or a lower bound."""

    what: str
    kind: str
    bound: float
    most: bool
    measure: Measure
    percent: bool = False

    def wanted(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.number(self.bound)}"

    def number(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}"

    def verdict(self, value: float) -> str:
        """Return whether the number meets the bound, as it is printed."""
        digits = round(value, 2)
        return "met" if (digits <= self.bound if self.most else digits >= self.bound) else "missed"


def _step(model: str, mode: str, quantity: str) -> Measure:
    def measure(device: Device) -> float | None:
        wanted = (model, 128, mode, MAX_BYTES)
        keys = ("model", "samples", "mode", "max_bytes")
        usual = (case for case in device.cases("steps") if case.get("tf32", True))
        found = (case for case in usual if tuple(case[key] for key in keys) == wanted)
        return next((case[quantity] for case in found), None)

    return measure


def _processes(device: Device, parallel: str) -> float | None:
    found = (case for case in device.cases("processes") if case.get("parallel", "DDP") == parallel)
    return max((case["mean_over_sgd"] for case in found), default=None)


def _memory(model: str, max_bytes: int) -> Measure:
    def measure(device: Device) -> float | None:
        wanted = (model, 128, max_bytes)
        keys = ("model", "samples", "max_bytes")
        found = (case for case in device.cases("memory") if tuple(case[key] for key in keys) == wanted)
        return next((case["over_sgd"] for case in found), None)

    return measure


def _speedup_over_the_paper(device: Device) -> float | None:
    return min((case["speedup"]["mean"] for case in device.cases("optimizers")), default=None)


def _speedup_over_torch(device: Device) -> float | None:
    kernels = [k for k in device.kernels() if k.speedup is not None]
    return min((k.speedup for k in kernels if k.beaten), default=1.0) if kernels else None


def _speedup_of(*names: str) -> Measure:
    """Return what measures the least speedup of some kernels over torch, for 30 layers at once."""

    def measure(device: Device) -> float | None:
        grouped = (k for k in device.kernels() if k.name in names and k.size.startswith("30 "))
        return min((k.speedup for k in grouped if k.speedup is not None), default=None)

    return measure


def _time_to_sgds_best(device: Device) -> float | None:
    """Return the mean over the seeds of TENGraD's time to SGD's best accuracy over SGD's; infinite if it never came."""
    times = list(times_to_sgds_best(device, "TENGraD, paper"))
    return fmean(math.inf if ours is None else ours / sgd for sgd, ours in times) if times else None


def _share_of_limit(device: Device) -> float | None:
    return min((kernel.share for kernel in device.kernels() if kernel.large), default=None)


_STEPS = (("3C1F", "plain"), ("3C1F", "compiled"), ("WRN-28-4", "plain"), ("ResNet-18", "plain"))
_GRAPHS = tuple((model, "cuda graphs") for model in ("3C1F", "WRN-28-4", "ResNet-18"))


def _of(kind: str, steps: Sequence[tuple[str, str]], mean: Mapping[str, float], refresh: float) -> Iterator[Target]:
    """Yield the targets of a kind of machine; ``mean`` bounds the mean step over SGD's by the kind of loop."""
    for model, mode in steps:
        case = f"{model}, N = 128, {mode}"
        yield Target(f"mean step over SGD's: {case}", kind, mean[mode], True, _step(model, mode, "mean_over_sgd"))
        yield Target(f"refresh step over SGD's: {case}", kind, refresh, True, _step(model, mode, "refresh_over_sgd"))
    for model, most, budget in (("3C1F", 1.5, MAX_BYTES), ("WRN-28-4", 2.0, MAX_BYTES), ("WRN-28-4", 2.0, BUDGET)):
        case = f"{model}, N = 128{within(budget)}"
        yield Target(f"peak memory over SGD's: {case}", kind, most, True, _memory(model, budget))
    yield Target("the authors' optimizer time over ours, least of all cases", kind, 10, False, _speedup_over_the_paper)
    yield Target("best torch expression over each kernel, beyond scatter", kind, 1, False, _speedup_over_torch)


def _host(model: str) -> Measure:
    def measure(device: Device) -> float | None:
        found = (case for case in device.cases("host") if case["model"] == model)
        return next((case["reuse_over_sgd"] for case in found), None)

    return measure


_HOST_BOUNDS = {"3C1F": 1.25, "WRN-28-4": 1.25, "ResNet-18": 1.25, "MLP": 1.6}

TARGETS: Sequence[Target] = (
    *_of("cpu", _STEPS, {"plain": 1.10, "compiled": 1.10}, refresh=4),
    *(
        Target(f"host time of a reuse step over that of SGD's: {model}", "cpu", bound, True, _host(model))
        for model, bound in _HOST_BOUNDS.items()
    ),
    *_of("cuda", (*_STEPS, *_GRAPHS), {"plain": 1.25, "compiled": 1.15, "cuda graphs": 1.10}, refresh=3),
    *(
        Target(
            f"mean step over SGD's in two processes: 3C1F, N = 2 x 64, {one}",
            "cpu",
            1.15,
            True,
            partial(_processes, parallel=one),
        )
        for one in ("DDP", "FSDP2")
    ),
    Target("best torch expression over Cholesky, 30 layers", "cuda", 2, False, _speedup_of("cholesky")),
    Target("best torch expression over gram, 30 layers", "cuda", 3, False, _speedup_of("gram", "gram_rows")),
    Target("error over torch's, most of all kernels by default", "cuda", 2, True, error_of_defaults),
    Target("time of TENGraD (paper) to SGD's best accuracy, over SGD's", "cuda", 0.6, True, _time_to_sgds_best),
    Target("share of the limit, least of the kernels at large sizes", "cuda", 0.6, False, _share_of_limit, True),
)


def verdicts(devices: Sequence[Device]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield target, machine, bound, measured and verdict: for each machine that has measured it, or once."""
    for target in TARGETS:
        values = [(device, target.measure(device)) for device in devices if device.kind == target.kind]
        measured = [(device, value) for device, value in values if value is not None]
        for device, value in measured:
            where = str(device.info["device"])
            yield target.what, where, target.wanted(), target.number(value), target.verdict(value)
        if not measured:
            where = {"cpu": "CPU", "cuda": "GPU"}[target.kind]
            yield target.what, where, target.wanted(), "–", "not measured"
