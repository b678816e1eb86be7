"""Layers whose weights multiply features: Linear and Bilinear.

`OuterProducts(a [N, 1, P, I], g [N, 1, P, O])` stands for the rows J_n = Σ_p g_np a_npᵀ of a weight [O, I]. The 1 is
the number of groups, which convolutions and packed attention projections may have more of.

Dimensions: N samples, P positions, I inputs, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers.contribution import Call, Canonical, OuterProducts, PerSampleGrads, arguments, canonical


def weight_grads(a: Tensor, g: Tensor) -> OuterProducts:
    """Return the contribution to a weight [O, I] from inputs ``a`` [N, …, I] and output gradients ``g`` [N, …, O]."""
    positions = math.prod(g.shape[1:-1])  # said, because a layer without inputs leaves it open
    return OuterProducts(a.reshape(len(a), 1, positions, a.shape[-1]), g.reshape(len(g), 1, positions, g.shape[-1]))


def bias_grads(g: Tensor) -> PerSampleGrads:
    """Return the contribution to a bias [O] from output gradients ``g`` [N, …, O]: Σ_p g_np."""
    return PerSampleGrads(widen(g).reshape(len(g), -1, g.shape[-1]).sum(1))


@canonical.register
def _(layer: nn.Linear, x: Tensor, grad_y: Tensor) -> Canonical:
    return {"weight": weight_grads(x, grad_y), "bias": bias_grads(grad_y)}


@canonical.register
def _(layer: nn.Bilinear, x: Call, grad_y: Tensor) -> Canonical:
    first, second = arguments(layer, x).values()
    # `matrix_view` of the weight [O, I₁, I₂] has the features of the first input last.
    pairs = torch.einsum("...j,...i->...ji", second, first).flatten(-2)
    return {"weight": weight_grads(pairs, grad_y), "bias": bias_grads(grad_y)}
