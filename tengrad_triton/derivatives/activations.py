"""Functions of single entries: f, f' and f'' of each, from what they share.

At the kinks of piecewise functions the derivatives are those of PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Slopes = tuple[Tensor, Tensor, Tensor | None]
"""f, f' and f'' at each entry, shaped like the input. None is an f'' of zeros."""

ActivationRule = Callable[[Any, Tensor], Slopes]
"""From a module and its input to f, f' and f''."""


def tanh(layer: nn.Tanh, z: Tensor) -> Slopes:
    """Return tanh with its derivatives."""
    t = z.tanh()
    slope = 1 - t.square()
    return t, slope, -2 * t * slope


def sigmoid(layer: nn.Sigmoid, z: Tensor) -> Slopes:
    """Return σ with its derivatives."""
    s = z.sigmoid()
    slope = s * (1 - s)
    return s, slope, slope * (1 - 2 * s)


def silu(layer: nn.SiLU, z: Tensor) -> Slopes:
    """Return z σ(z) with its derivatives."""
    s = z.sigmoid()
    slope = s * (1 - s)
    return z * s, s + z * slope, slope * (2 + z * (1 - 2 * s))


def gelu(layer: nn.GELU, z: Tensor) -> Slopes:
    """Return z Φ(z) with its derivatives, or those of its approximation by tanh."""
    if layer.approximate == "tanh":
        return gelu_tanh(z)
    square = z.square()
    cdf = 0.5 + 0.5 * (z * math.sqrt(0.5)).erf()
    density = (-0.5 * square).exp() * (1 / math.sqrt(2 * math.pi))
    return z * cdf, cdf + z * density, density * (2 - square)


def gelu_tanh(z: Tensor) -> Slopes:
    """Return z (1 + tanh q(z)) / 2 with its derivatives, where q(z) = √(2/π) (z + 0.044715 z³)."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square, half = z.square(), 0.5 * z
    t = (scale * z * (1 + cubic * square)).tanh()
    slope = 1 - t.square()
    q1, q2 = scale * (1 + 3 * cubic * square), 6 * scale * cubic * z
    return half * (1 + t), 0.5 * (1 + t) + half * slope * q1, slope * (q1 + half * q2 - z * t * q1.square())


def softplus(layer: nn.Softplus, z: Tensor) -> Slopes:
    """Return log(1 + exp(βz)) / β with its derivatives, and z above PyTorch's threshold."""
    scaled = layer.beta * z
    s = torch.where(scaled > layer.threshold, 1.0, scaled.sigmoid())
    return F.softplus(z, layer.beta, layer.threshold), s, layer.beta * s * (1 - s)


def relu(layer: nn.ReLU, z: Tensor) -> Slopes:
    """Return max(z, 0) with its derivatives."""
    return z.relu(), (z > 0).to(z.dtype), None


def leaky_relu(layer: nn.LeakyReLU, z: Tensor) -> Slopes:
    """Return z, or a multiple of it below 0, with its derivatives."""
    slope = torch.where(z > 0, torch.ones_like(z), layer.negative_slope)
    return slope * z, slope, None


def elu(layer: nn.ELU, z: Tensor) -> Slopes:
    """Return z, or α (exp z − 1) below 0, with its derivatives."""
    is_above, below = z > 0, layer.alpha * z.clamp(max=0).exp()
    return F.elu(z, layer.alpha), torch.where(is_above, 1.0, below), torch.where(is_above, 0.0, below)


ACTIVATIONS: dict[type[nn.Module], ActivationRule] = {
    nn.Tanh: tanh, nn.Sigmoid: sigmoid, nn.SiLU: silu, nn.GELU: gelu, nn.Softplus: softplus, nn.ReLU: relu,
    nn.LeakyReLU: leaky_relu, nn.ELU: elu,
}  # fmt: skip
"""The derivatives of each elementwise module."""
