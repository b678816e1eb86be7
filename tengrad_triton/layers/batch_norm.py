"""Batch norm: which statistics it uses, and whether it mixes samples.

A layer mixes samples if its output for one sample depends on other samples.

Dimensions: N samples, C channels; a * stands for any further dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def statistics(layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [C] and the inverse standard deviation [C] with which a batch norm normalizes ``x`` [N, C, *]."""
    if mixes_samples(layer):
        var_C, mean_C = torch.var_mean(x.detach(), [0, *range(2, x.dim())], correction=0)
    else:
        mean_C, var_C = layer.running_mean, layer.running_var  # type: ignore[assignment]
    return mean_C, (var_C + layer.eps).rsqrt()


def mixes_samples(layer: nn.Module) -> bool:
    """Whether the layer is a batch norm that uses the statistics of the batch in its present mode."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def statistics_scale(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the derivative of a batch norm's output with respect to its input ``x`` [N, C, *], at fixed statistics.

    For each channel this is weight / standard deviation. The result has the shape [1, C, 1, …].
    """
    assert isinstance(layer, _BatchNorm)
    _, inverse_C = statistics(layer, x)
    scale_C = inverse_C if layer.weight is None else inverse_C * layer.weight.detach()
    return broadcast(scale_C, x)


def broadcast(v_C: Tensor, x: Tensor) -> Tensor:
    """Return ``v_C`` as [1, C, 1, …], with as many dimensions as ``x``."""
    return v_C.view(1, -1, *(1 for _ in x.shape[2:]))
