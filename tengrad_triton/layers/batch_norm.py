"""Batch norm's statistics: which ones it uses, and whether they make samples depend on each other.

Dimensions: N samples, C channels; a * stands for any further ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def statistics(layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the inverse standard deviation [C] by which a batch norm scales ``x`` [N, C, *]."""
    if mixes_samples(layer):
        var_C, mean_C = torch.var_mean(x.detach(), [0, *range(2, x.dim())], correction=0)
    else:
        mean_C, var_C = layer.running_mean, layer.running_var  # type: ignore[assignment]
    return mean_C, (var_C + layer.eps).rsqrt()


def mixes_samples(layer: nn.Module) -> bool:
    """Whether a layer's output for one sample depends on the others: batch norm with the batch's own statistics."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def frozen_scale(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the scale, shaped to be multiplied with ``x``, by which a batch norm takes x to y, statistics constant."""
    assert isinstance(layer, _BatchNorm)
    _, inverse_C = statistics(layer, x)
    scale_C = inverse_C if layer.weight is None else inverse_C * layer.weight.detach()
    return broadcast(scale_C, x)


def broadcast(v_C: Tensor, x: Tensor) -> Tensor:
    """Return [C] as [1, C, 1, …]."""
    return v_C.view(1, -1, *(1 for _ in x.shape[2:]))
