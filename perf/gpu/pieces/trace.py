"""What a step consists of: the device's kernels in a refresh, a reuse step and SGD's step, and the time of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from perf.loops import Step, plain_step, sgd_step, tengrad
from perf.models import MODELS

INTERVAL, REUSES = 6, 4
MOST = 40  # kernels of a step that are kept


@dataclass(frozen=True)
class TraceCase:
    """A model and a batch size."""

    model: str
    samples: int

    def __str__(self) -> str:
        return f"{self.model}, N = {self.samples}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return, for each kind of step, the seconds of its kernels, their names, counts and seconds.

        The kernels' seconds do not depend on the profiler, which slows the host only. On a CPU, where nothing is
        launched, they are the operations of torch.
        """
        made = MODELS[self.model]
        x, y = made.batch(self.samples, device)
        model = made.on(device)
        ours, sgd = plain_step(model, tengrad(model, INTERVAL)), sgd_step(made.on(device), "plain")
        for _ in range(INTERVAL):  # the next step of TENGraD refreshes
            ours(x, y)
            sgd(x, y)
        kinds = {"refresh": (ours, 1), "reuse": (ours, REUSES), "sgd": (sgd, REUSES)}
        return {**asdict(self), "steps": {kind: traced(step, times, x, y) for kind, (step, times) in kinds.items()}}


def traced(step: Step, times: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the kernels of a step, the longest first, as means over some steps."""
    on_gpu = x.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            step(x, y)
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        # Not phases of the step, whose kernels are listed themselves, nor, on a GPU, what the host does.
        if event.is_user_annotation or (on_gpu and event.device_type != DeviceType.CUDA):
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0:
            found.append({"name": event.key[:90], "count": event.count / times, "seconds": 1e-6 * micros / times})
    found.sort(key=lambda kernel: -kernel["seconds"])
    return {"seconds": sum(kernel["seconds"] for kernel in found), "number": len(found), "kernels": found[:MOST]}


def cases(quick: bool) -> Iterator[TraceCase]:
    """Yield the cases."""
    if quick:
        yield TraceCase("tiny 3C1F", 8)
        return
    for model in ("3C1F", "ResNet-18", "WRN-28-4", "MLP 2048"):
        yield TraceCase(model, 128)
