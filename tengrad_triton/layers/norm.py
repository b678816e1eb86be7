"""Elementwise scales: normalization layers and PReLU. J_n = Σ_p g_np ∘ x̂_np is a short vector, so it is kept.

Dimensions: N samples, C channels; a * stands for any further ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.layers.batch_norm import broadcast, statistics
from tengrad_triton.layers.contribution import Canonical, PerSampleGrads, canonical

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def _by_shape(g: Tensor, shape: tuple[int, ...]) -> PerSampleGrads:
    """Return [N, *shape]: the sum over what lies between the samples and the last dimensions."""
    return PerSampleGrads(g.reshape(len(g), -1, *shape).sum(1))


def _by_channel(g: Tensor) -> PerSampleGrads:
    """Return [N, C] of [N, C, *]."""
    return PerSampleGrads(g.flatten(2).sum(2) if g.dim() > 2 else g)


@canonical.register
def _(layer: nn.LayerNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    shape = tuple(layer.normalized_shape)
    x_hat = F.layer_norm(x, shape, None, None, layer.eps)
    return {"weight": _by_shape(grad_y * x_hat, shape), "bias": _by_shape(grad_y, shape)}


@canonical.register
def _(layer: nn.RMSNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    shape = tuple(layer.normalized_shape)
    return {"weight": _by_shape(grad_y * F.rms_norm(x, shape, None, layer.eps), shape)}


@canonical.register
def _(layer: nn.GroupNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    x_hat = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    return {"weight": _by_channel(grad_y * x_hat), "bias": _by_channel(grad_y)}


@canonical.register
def _(layer: InstanceNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    kept = not layer.training and layer.track_running_stats
    mean, var = (layer.running_mean, layer.running_var) if kept else (None, None)
    x_hat = F.instance_norm(x, mean, var, use_input_stats=not kept, eps=layer.eps)
    return {"weight": _by_channel(grad_y * x_hat), "bias": _by_channel(grad_y)}


@canonical.register
def _(layer: BatchNorm, x: Tensor, grad_y: Tensor) -> Canonical:
    mean_C, inverse_C = statistics(layer, x)
    x_hat = (x - broadcast(mean_C, x)) * broadcast(inverse_C, x)
    return {"weight": _by_channel(grad_y * x_hat), "bias": _by_channel(grad_y)}


@canonical.register
def _(layer: nn.PReLU, x: Tensor, grad_y: Tensor) -> Canonical:
    j = grad_y * x.clamp(max=0)
    return {"weight": _by_channel(j) if layer.num_parameters > 1 else PerSampleGrads(j.flatten(1).sum(1, keepdim=True))}
