"""Elementwise scales: normalization layers and PReLU.

J_n = Σ_p g_np ∘ x̂_np has one entry for each feature, so it is stored explicitly (docs/math.md, M1).

Dimensions: N samples, C channels; a * stands for any further dimensions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.layers.batch_norm import broadcast, statistics
from tengrad_triton.layers.contribution import Canonical, PerSampleGrads, canonical

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def _sum_to_shape(g: Tensor, shape: tuple[int, ...]) -> PerSampleGrads:
    """Sum ``g`` [N, …, *shape] over the dimensions between the samples and ``shape``."""
    return PerSampleGrads(g.reshape(len(g), -1, *shape).sum(1))


def _sum_to_channels(g: Tensor) -> PerSampleGrads:
    """Sum ``g`` [N, C, *] over the dimensions after the channels."""
    return PerSampleGrads(g.flatten(2).sum(2) if g.dim() > 2 else g)


@canonical.register
def _(layer: nn.LayerNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    shape = tuple(layer.normalized_shape)
    x_hat = F.layer_norm(x, shape, None, None, layer.eps)
    return {"weight": _sum_to_shape(grad_y * x_hat, shape), "bias": _sum_to_shape(grad_y, shape)}


@canonical.register
def _(layer: nn.RMSNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    shape = tuple(layer.normalized_shape)
    return {"weight": _sum_to_shape(grad_y * F.rms_norm(x, shape, None, layer.eps), shape)}


@canonical.register
def _(layer: nn.GroupNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    x_hat = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    return {"weight": _sum_to_channels(grad_y * x_hat), "bias": _sum_to_channels(grad_y)}


@canonical.register
def _(layer: InstanceNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    running = not layer.training and layer.track_running_stats
    mean, var = (layer.running_mean, layer.running_var) if running else (None, None)
    x_hat = F.instance_norm(x, mean, var, use_input_stats=not running, eps=layer.eps)
    return {"weight": _sum_to_channels(grad_y * x_hat), "bias": _sum_to_channels(grad_y)}


@canonical.register
def _(layer: BatchNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    mean_C, inverse_C = statistics(layer, x)
    x_hat = (x - broadcast(mean_C, x)) * broadcast(inverse_C, x)
    return {"weight": _sum_to_channels(grad_y * x_hat), "bias": _sum_to_channels(grad_y)}


@canonical.register
def _(layer: nn.PReLU, x: Tensor, grad_y: Tensor) -> Canonical:
    j = grad_y * x.clamp(max=0)
    shared = layer.num_parameters == 1
    return {"weight": PerSampleGrads(j.flatten(1).sum(1, keepdim=True)) if shared else _sum_to_channels(j)}
