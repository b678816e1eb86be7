"""Tables that are looked up. Neither one-hot vectors nor anything as large as the vocabulary is made.

Dimensions: N samples or bags, P positions, D entries of a table's row; B entries of all bags.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Canonical, EmbeddingGrads, Inputs, arguments, canonical


def _lookup(layer: nn.Embedding | nn.EmbeddingBag, ids_NP: Tensor, g_NPD: Tensor) -> EmbeddingGrads:
    """Return the lookup; the entry at ``padding_idx`` gets no gradient."""
    if layer.padding_idx is not None:
        g_NPD = g_NPD.masked_fill((ids_NP == layer.padding_idx)[..., None], 0)
    return EmbeddingGrads(ids_NP, g_NPD, layer.num_embeddings)


@canonical.register
def _(layer: nn.Embedding, x: Tensor, grad_y: Tensor) -> Canonical:
    ids_NP = x.reshape(len(x), -1)
    return {"weight": _lookup(layer, ids_NP, grad_y.reshape(*ids_NP.shape, -1))}


@canonical.register
def _(layer: nn.EmbeddingBag, x: Inputs, grad_y: Tensor) -> Canonical:
    named = arguments(layer, x)
    ids_NP, weights = named["input"], named["per_sample_weights"]
    inside_NP = torch.ones_like(ids_NP, dtype=torch.bool)
    if ids_NP.dim() == 1:
        ids_NP, weights, inside_NP = _bags(layer, ids_NP, named["offsets"], weights, len(grad_y))
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
    return {"weight": _lookup(layer, ids_NP, grad_y[:, None] * share_NPD)}


def _bags(
    layer: nn.EmbeddingBag, ids_B: Tensor, offsets: Tensor, weights_B: Tensor | None, bags: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return bags of different sizes side by side: ids, weights, and which places there are."""
    starts_N = offsets[:bags]
    sizes_N = torch.cat([starts_N[1:], starts_N.new_tensor([len(ids_B)])]) - starts_N
    if layer.include_last_offset:
        sizes_N = offsets[1:] - starts_N
    places_P = torch.arange(int(sizes_N.max()) if bags else 0, device=ids_B.device)
    inside_NP = places_P < sizes_N[:, None]
    at_NP = (starts_N[:, None] + places_P).clamp(max=max(0, len(ids_B) - 1))
    return ids_B[at_NP], None if weights_B is None else weights_B[at_NP], inside_NP


def why_not_exact(layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Return which option makes a table's gradient something else than the derivative, or its update something else."""
    if layer.sparse:
        return "sparse=True: its gradient is no dense tensor, which the natural gradient needs; use sparse=False"
    if layer.max_norm is not None:
        return "max_norm rewrites its rows within the forward; use max_norm=None"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq=True scales its gradient, which is no derivative then; use False"
    return None
