"""Embedding tables. No rule forms a one-hot vector or another tensor of the vocabulary's size.

Dimensions: N samples or bags, P positions, D entries of a vector of the table; B ids of all bags together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Canonical, EmbeddingGrads, Inputs, arguments, canonical


def _table_grads(layer: nn.Embedding | nn.EmbeddingBag, ids_NP: Tensor, g_NPD: Tensor) -> EmbeddingGrads:
    """Return the contribution to the table; its vector at ``padding_idx`` gets no gradient."""
    if layer.padding_idx is not None:
        g_NPD = g_NPD.masked_fill((ids_NP == layer.padding_idx)[..., None], 0)
    return EmbeddingGrads(ids_NP, g_NPD, layer.num_embeddings)


@canonical.register
def _(layer: nn.Embedding, x: Tensor, grad_y: Tensor) -> Canonical:
    ids_NP = x.reshape(len(x), -1)
    return {"weight": _table_grads(layer, ids_NP, grad_y.reshape(*ids_NP.shape, -1))}


@canonical.register
def _(layer: nn.EmbeddingBag, x: Inputs, grad_y: Tensor) -> Canonical:
    named_args = arguments(layer, x)
    ids_NP, weights = named_args["input"], named_args["per_sample_weights"]
    inside_NP = torch.ones_like(ids_NP, dtype=torch.bool)
    if ids_NP.dim() == 1:
        ids_NP, weights, inside_NP = _padded_bags(layer, ids_NP, named_args["offsets"], weights, len(grad_y))
    if layer.padding_idx is not None:
        inside_NP = inside_NP & (ids_NP != layer.padding_idx)
    if layer.mode == "max":
        entries_NPD = layer.weight.detach()[ids_NP].masked_fill(~inside_NP[..., None], -torch.inf)
        largest_N1D = entries_NPD.argmax(1, keepdim=True)
        share_NPD = torch.zeros_like(entries_NPD).scatter_(1, largest_N1D, 1.0) * inside_NP[..., None]
    else:
        share_NP = inside_NP.to(grad_y.dtype) if weights is None else weights * inside_NP
        share_NP = share_NP / inside_NP.sum(1, keepdim=True).clamp(min=1) if layer.mode == "mean" else share_NP
        share_NPD = share_NP[..., None]
    return {"weight": _table_grads(layer, ids_NP, grad_y[:, None] * share_NPD)}


def _padded_bags(
    layer: nn.EmbeddingBag, ids_B: Tensor, offsets: Tensor, weights_B: Tensor | None, bags: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pad bags of different sizes to P positions; return ids, weights, and a mask that is False for padding."""
    starts_N = offsets[:bags]
    sizes_N = torch.cat([starts_N[1:], starts_N.new_tensor([len(ids_B)])]) - starts_N
    if layer.include_last_offset:
        sizes_N = offsets[1:] - starts_N
    positions_P = torch.arange(int(sizes_N.max()) if bags else 0, device=ids_B.device)
    inside_NP = positions_P < sizes_N[:, None]
    at_NP = (starts_N[:, None] + positions_P).clamp(max=max(0, len(ids_B) - 1))
    return ids_B[at_NP], None if weights_B is None else weights_B[at_NP], inside_NP


def why_not_exact(layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Return why the table's gradient is not the derivative of the loss: the option and its remedy; or None."""
    if layer.sparse:
        return "sparse=True, but the natural gradient needs a dense gradient: use sparse=False"
    if layer.max_norm is not None:
        return f"max_norm={layer.max_norm}, which rewrites vectors of the table in the forward pass: use max_norm=None"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq=True, whose gradient is not the derivative of the loss: use scale_grad_by_freq=False"
    return None
