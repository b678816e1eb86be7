"""The targets of the project, and whether the results meet them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
        found = (c for c in device.cases("steps") if tuple(c[key] for key in keys) == wanted)
        return next((case[quantity] for case in found), None)

    return measure


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


def _speedup_of_groups(device: Device) -> float | None:
    grouped = (k for k in device.kernels() if k.name in ("gram", "gram_rows", "cholesky") and k.size.startswith("30 "))
    return min((k.speedup for k in grouped if k.speedup is not None), default=None)


def _share_of_limit(device: Device) -> float | None:
    return min((kernel.share for kernel in device.kernels() if kernel.large), default=None)


def _of(kind: str, mean: float, refresh: float) -> Iterator[Target]:
    for model, mode in (("3C1F", "plain"), ("3C1F", "compiled"), ("WRN-28-4", "plain"), ("ResNet-18", "plain")):
        case = f"{model}, N = 128, {mode}"
        yield Target(f"mean step over SGD's: {case}", kind, mean, True, _step(model, mode, "mean_over_sgd"))
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
    *_of("cpu", mean=1.10, refresh=4),
    *_of("cuda", mean=1.15, refresh=3),
    *(
        Target(f"host time of a reuse step over that of SGD's: {model}", "cpu", bound, True, _host(model))
        for model, bound in _HOST_BOUNDS.items()
    ),
    Target("best torch expression over gram and Cholesky, 30 layers", "cuda", 2, False, _speedup_of_groups),
    Target("share of the limit, least of the kernels at large sizes", "cuda", 0.6, False, _share_of_limit, True),
)


def verdicts(devices: Sequence[Device]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield target, machine, bound, measured and verdict for each machine, or once for a kind without a machine."""
    for target in TARGETS:
        able = [device for device in devices if device.kind == target.kind] or [None]
        for device in able:
            value = None if device is None else target.measure(device)
            where = {"cpu": "CPU", "cuda": "GPU"}[target.kind] if device is None else str(device.info["device"])
            if value is None:
                yield target.what, where, target.wanted(), "–", "not measured"
            else:
                yield target.what, where, target.wanted(), target.number(value), target.verdict(value)
