"""The time of a run, estimated from its first steps, and the least memory it needs, from its shapes.

Key: N samples; a layer has I inputs and O outputs at each of P positions. The I of a convolution counts its kernel.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.memory import free_bytes
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import LayerSizes, OptimizerName
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.loop import EVAL_BATCH
from tengrad_triton.recipes.training.warm_up import seconds_of_steps

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """The time of one run.

    Attributes:
        step: mean seconds of a step, at the refresh interval of the settings.
        steps: number of steps.
        evaluations: seconds of all evaluations.
    """

    step: float
    steps: int
    evaluations: float

    @property
    def seconds(self) -> float:
        """The seconds of the whole run."""
        return self.step * self.steps + self.evaluations


def estimate(job: Job, name: OptimizerName) -> Estimate:
    """Return an estimate from the first steps of an optimizer; an evaluation counts as a third of a plain step.

    Raises `UsageError` as `check_memory` does.
    """
    check_memory(job, name)
    settings = job.settings
    first, *later = seconds_of_steps(job, name, steps=4)
    plain = statistics.median(later)
    every = getattr(settings.of(name), "refresh_every", 10)  # TENGraD's own interval is not fixed: 10 early on
    refresh = max(0.0, first - plain) / every
    steps = settings.epochs * -(-len(job.data.train) // settings.batch_size)
    images = len(job.data.test) * settings.epochs
    return Estimate(plain + refresh, steps, images * plain / settings.batch_size / 3 + images / EVAL_BATCH * 1e-3)


def check_memory(job: Job, name: OptimizerName) -> None:
    """Raise `UsageError` with the estimate if a run needs more memory than is free."""
    need, free = needed_bytes(job, name), free_bytes(job.device)
    if need > free:
        raise UsageError(
            f"{name} on {job.settings.model} needs at least {need / 2**30:.1f} GiB at {job.settings.batch_size} images "
            f"a step, and {free / 2**30:.1f} GiB are free: lower --scale.batch-size or --scale.width"
        )


def needed_bytes(job: Job, name: OptimizerName) -> int:
    """Return the least memory of a step: weights, gradients, momentum, what backward keeps, and the curvature.

    The curvature counts once what each method must store by the paper's table 1.
    """
    model, sizes, kept = _trace(job)
    parameters = sum(p.numel() for p in model.parameters())
    n = job.settings.batch_size
    curvature = sum(OPTIMIZERS[name].curvature_numbers(size, n) for size in sizes.values())
    return FLOAT * (3 * parameters + n * kept + curvature)


def _trace(job: Job) -> tuple[nn.Module, Mapping[str, LayerSizes], int]:
    """Return a model on the meta device, its layers' sizes, and how many numbers its layers return for a sample."""
    with torch.device("meta"):
        model = job.model()
    sizes: dict[str, LayerSizes] = {}
    kept = 0

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        nonlocal kept
        kept += output[0].numel()
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor):
            outputs, inputs = weight.flatten(1).shape
            sizes[name] = LayerSizes(inputs, outputs, output[0].numel() // outputs, weight.numel())

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
    model(torch.empty(2, *job.data.train.images.shape[1:], device="meta"))
    return model, sizes, kept
