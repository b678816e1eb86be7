"""Whole training steps: SGD's, and TENGraD's refresh and reuse steps, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from perf import limits
from perf.limits import Limits, allowing_tf32
from perf.loops import Mode, Step, sgd_step, tengrad, tengrad_step, within
from perf.models import MODELS, Model
from perf.timing import interleaved, mean_step
from tengrad_triton import TENGraD
from tengrad_triton.curvature.geometry import geometry_of
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.tuning.plan import MAX_BYTES

# Rounds: the first step of a compiled loop is plain, and CUDA graphs are recorded in the second compiled one.
WARM_UP: dict[Mode, int] = {"plain": 1, "compiled": 2, "cuda graphs": 3}


@dataclass(frozen=True)
class StepCase:
    """A model, a batch size, the number of rounds, the kind of loop, and a budget for J in bytes.

    ``tf32`` says whether a GPU may round to TF32 in the convolutions of forward and backward, as it may by torch's
    default. Our kernels never round so.
    """

    model: str
    samples: int
    rounds: int
    mode: Mode = "plain"
    max_bytes: int = MAX_BYTES
    tf32: bool = True

    def __str__(self) -> str:
        return f"{self.model}, N = {self.samples}, {loop_name(self.mode, self.tf32)}{within(self.max_bytes)}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of SGD's steps and of TENGraD's refresh and reuse steps, ratios, and the bytes of J."""
        made = MODELS[self.model]
        with allowing_tf32(convolutions=self.tf32, products=False):
            found = measure_steps(made, self.samples, self.rounds, self.mode, device, self.max_bytes)
        return {**asdict(self), **found}


def loop_name(mode: Mode, tf32: bool) -> str:
    """Return the kind of loop, and the precision of its convolutions where that is not torch's default."""
    return mode if tf32 else f"{mode}, IEEE convolutions"


def measure_steps(
    made: Model, samples: int, rounds: int, mode: Mode, device: torch.device, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Return the results of `StepCase.measure` for any model."""
    x, y = made.batch(samples, device)
    # A GPU runs behind the host, as in a training loop: its steps are timed in blocks.
    block = 10 if device.type == "cuda" else 1
    model = made.on(device)
    optimizer = tengrad(model, block + 2, max_bytes)
    ours = tengrad_step(model, optimizer, mode)
    sgd = sgd_step(made.on(device), mode)
    timers = {"sgd": sgd_timer(sgd, block, x, y), "tengrad": tengrad_timer(ours, block, x, y)}
    for _ in range(WARM_UP[mode]):
        for timer in timers.values():
            timer()
    times = interleaved(timers, rounds)
    kept = sum(parameter.bytes for parameter in optimizer.summary().parameters)
    least = least_seconds(optimizer, limits.measure(device, small=made.tiny))
    return {"block": block, "seconds": times, **ratios(times), "kept_bytes": kept, "least_seconds": least}


def least_seconds(optimizer: TENGraD, rates: Limits) -> float:
    """Return the least seconds of the two products with J in every step, at the machine's rates.

    A stored J is read twice. A weight that keeps the factors takes 2 G N P I O operations twice, or the time to read
    its rows of J twice where that is less: no exact step is faster.
    """
    assert optimizer._curvature is not None
    blocks = optimizer._curvature.jacobians.values()
    return sum(2 * _product_seconds(jacobian, rates) for block in blocks for jacobian in block.values())


def _product_seconds(jacobian: Jacobian, rates: Limits) -> float:
    if not isinstance(jacobian, Factored):
        return rates.seconds(0, jacobian.nbytes)
    sizes = geometry_of(jacobian.factors)
    product = 2 * sizes.groups * sizes.samples * sizes.positions * sizes.inputs * sizes.outputs
    return min(rates.seconds(0, sizes.per_sample_bytes), rates.seconds(product, jacobian.nbytes))


def ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the median times of the refresh, the reuse and the mean step over SGD's.

    The first step after a refresh is timed apart, because the refresh has replaced the content of the caches.
    """
    sgd, refresh, first, reuse = (times[name]["median"] for name in ("sgd", "refresh", "first", "reuse"))
    return {
        "refresh_over_sgd": refresh / sgd,
        "reuse_over_sgd": reuse / sgd,
        "mean_over_sgd": mean_step(refresh + first - reuse, reuse) / sgd,
    }


def _block(step: Step, times: int, x: Tensor, y: Tensor) -> float:
    start = now(x.device)
    for _ in range(times):
        step(x, y)
    return (now(x.device) - start) / times


def sgd_timer(step: Step, block: int, x: Tensor, y: Tensor) -> Callable[[], dict[str, float]]:
    """Return a timer of the mean of ``block`` steps."""
    return lambda: {"sgd": _block(step, block, x, y)}


def tengrad_timer(step: Step, block: int, x: Tensor, y: Tensor) -> Callable[[], dict[str, float]]:
    """Return a timer of one refresh, of the step after it, and of the later steps until the next refresh."""
    return lambda: {name: _block(step, n, x, y) for name, n in (("refresh", 1), ("first", 1), ("reuse", block))}
