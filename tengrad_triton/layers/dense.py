"""Layers whose weights multiply features: Linear and Bilinear.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Call, Canonical, OuterProducts, PerSampleGrads, arguments, canonical


def dense(a: Tensor, g: Tensor) -> OuterProducts:
    """Return the outer product of a weight [O, I] with inputs [N, …, I] and derivatives [N, …, O]."""
    return OuterProducts(a.reshape(len(a), 1, -1, a.shape[-1]), g.reshape(len(g), 1, -1, g.shape[-1]))


def summed(g: Tensor) -> PerSampleGrads:
    """Return the rows of a bias with derivatives [N, …, O]: Σ_p g_np."""
    return PerSampleGrads(g.reshape(len(g), -1, g.shape[-1]).sum(1))


@canonical.register
def _(layer: nn.Linear, x: Tensor, grad_y: Tensor) -> Canonical:
    return {"weight": dense(x, grad_y), "bias": summed(grad_y)}


@canonical.register
def _(layer: nn.Bilinear, x: Call, grad_y: Tensor) -> Canonical:
    first, second = arguments(layer, x).values()
    # The weight is [O, I₁, I₂], which in the canonical order has the first input's features last.
    pairs = torch.einsum("...j,...i->...ji", second, first).flatten(-2)
    return {"weight": dense(pairs, grad_y), "bias": summed(grad_y)}
