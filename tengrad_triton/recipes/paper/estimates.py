"""How long a run will take, from its first steps; and how much memory it needs at least, from its shapes.

Key: N samples; a layer has I inputs and O outputs at each of P positions (a convolution's I counts its window).
"""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.loop import EVAL_BATCH, Job, seconds_of_steps

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """A layer's I, O and P, and how many parameters it has."""

    inputs: int
    outputs: int
    positions: int
    parameters: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run."""

    step: float  # the mean, at the refresh interval of the settings
    steps: int
    evaluations: float

    @property
    def seconds(self) -> float:
        """The whole run's."""
        return self.step * self.steps + self.evaluations


def estimated(job: Job, name: OptimizerName) -> Estimate:
    """Time the first steps of an optimizer; a forward alone is taken as a third of a plain step.

    Raises `UsageError` as `check_memory` does.
    """
    check_memory(job, name)
    settings = job.settings
    first, *later = seconds_of_steps(job, name, steps=4)
    plain = statistics.median(later)
    every = getattr(settings.of(name), "refresh_every", 10)  # tengrad_defaults begins with 10
    refresh = max(0.0, first - plain) / every
    steps = settings.epochs * -(-len(job.data.train) // settings.batch_size)
    images = len(job.data.test) * settings.epochs
    return Estimate(plain + refresh, steps, images * plain / settings.batch_size / 3 + images / EVAL_BATCH * 1e-3)


def check_memory(job: Job, name: OptimizerName) -> None:
    """Raise `UsageError` with the estimate if a run needs more memory than there is."""
    need, free = needed_bytes(job, name), free_bytes(job.device)
    if need > free:
        raise UsageError(
            f"{name} on {job.settings.model} needs at least {need / 2**30:.1f} GiB at {job.settings.batch_size} images "
            f"a step, and {free / 2**30:.1f} GiB are free: lower --scale.batch-size or --scale.width"
        )


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free, on the GPU or on the machine; without an answer, what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    linux = Path("/proc/meminfo")
    if linux.exists():
        entries = dict(line.split(":") for line in linux.read_text(encoding="utf-8").splitlines())
        return 1024 * int(entries["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def needed_bytes(job: Job, name: OptimizerName) -> int:
    """Return the least that a step needs: weights, gradients, momentum, what backward keeps, and the curvature.

    The curvature is counted by what the paper's table 1 says must be stored, once.
    """
    model, sizes, kept = _traced(job)
    parameters = sum(p.numel() for p in model.parameters())
    n = job.settings.batch_size
    curvature = sum(_curvature(name, size, n) for size in sizes.values())
    return FLOAT * (3 * parameters + n * kept + curvature)


def _curvature(name: OptimizerName, size: Sizes, n: int) -> int:
    rows = n * min(size.parameters, size.positions * (size.inputs + size.outputs))
    factors = size.inputs**2 + size.outputs**2
    by_name = {"tengrad": rows + n**2, "ekfac": factors + size.parameters}
    by_name |= dict.fromkeys(("kfac", "kbfgs", "kbfgsl"), factors)
    return by_name.get(name, 0)


def _traced(job: Job) -> tuple[nn.Module, Mapping[str, Sizes], int]:
    """Return a model without memory, its layers' sizes, and the numbers a sample that its layers hand on."""
    with torch.device("meta"):
        model = job.model()
    sizes: dict[str, Sizes] = {}
    kept = 0

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        nonlocal kept
        kept += output[0].numel()
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor):
            outputs, inputs = weight.flatten(1).shape
            sizes[name] = Sizes(inputs, outputs, output[0].numel() // outputs, weight.numel())

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
    model(torch.empty(2, *job.data.train.images.shape[1:], device="meta"))
    return model, sizes, kept
