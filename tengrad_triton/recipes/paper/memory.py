"""The least memory that steps of a model need, from the shapes of its layers.

Key: N samples; a layer has I inputs and O outputs at each of P positions. The I of a convolution counts its kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.memory import free_bytes
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import LayerSizes, OptimizerName
from tengrad_triton.recipes.optimizers.tengrad import ExactSettings
from tengrad_triton.recipes.training.job import Job

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """The number of parameters of a model, its layers' sizes, and how many numbers its layers return for a sample."""

    parameters: int
    layers: Mapping[str, LayerSizes]
    kept: int


def check_memory(what: str, need: int, device: torch.device, advice: str) -> None:
    """Raise `UsageError` with the estimate if something needs more memory than is free."""
    free = free_bytes(device)
    if need > free:
        raise UsageError(f"{what} needs at least {readable(need)}, and {readable(free)} are free: {advice}")


def readable(count: int) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def check_run(job: Job, name: OptimizerName) -> None:
    """Raise `UsageError` if a run needs more memory than is free."""
    what = f"{name} on {job.settings.model} with {job.settings.batch_size} images a step"
    check_memory(what, needed_bytes(job, name), job.device, "lower --scale.batch-size or --scale.width")


def needed_bytes(job: Job, name: OptimizerName) -> int:
    """Return the least memory of a run's step."""
    return bytes_of_step(sizes_of(job.model, job.data.train.images.shape[1:]), name, job.settings.batch_size)


def bytes_of_step(sizes: Sizes, name: OptimizerName, n: int) -> int:
    """Return the least memory of a step: weights, gradients, momentum, what backward keeps, and the curvature.

    The curvature counts once what each method must store by the paper's table 1.
    """
    curvature = sum(OPTIMIZERS[name].curvature_numbers(layer, n) for layer in sizes.layers.values())
    return FLOAT * (3 * sizes.parameters + n * sizes.kept + curvature)


def bytes_of_all_classes(sizes: Sizes, n: int, classes: int) -> int:
    """Return the least memory of TENGraD with a row of J for every class of every sample.

    Beside what a plain step needs, it stores the output gradients of all classes, and the curvature of so many rows.
    """
    rows = n * classes
    layers = sizes.layers.values()
    grads = rows * sum(layer.positions * layer.outputs for layer in layers)
    curvature = sum(ExactSettings.curvature_numbers(layer, rows) for layer in layers)
    return FLOAT * (3 * sizes.parameters + n * sizes.kept + grads + curvature)


def sizes_of(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Sizes:
    """Return the sizes of a model for samples of a shape. It is made on the meta device, and takes no memory."""
    with torch.device("meta"):
        model = make()
    layers: dict[str, LayerSizes] = {}
    kept = 0

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        nonlocal kept
        kept += output[0].numel()
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor):
            outputs, inputs = weight.flatten(1).shape
            layers[name] = LayerSizes(inputs, outputs, output[0].numel() // outputs, weight.numel())

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
    model(torch.empty(2, *shape, device="meta"))
    return Sizes(sum(p.numel() for p in model.parameters()), layers, kept)
