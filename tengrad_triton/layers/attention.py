"""The rule of `nn.MultiheadAttention`, whose projections are uncalled linear layers (see `uncalled`).

Dimensions: N samples, T queries, S keys, E features, P positions, G groups, I inputs and O outputs of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Canonical, Contribution, OuterProducts, PerSampleGrads, canonical
from tengrad_triton.layers.dense import bias_grads, weight_grads
from tengrad_triton.layers.uncalled import (
    Tap,
    UncalledTensors,
    Weights,
    canonical_from_uncalled,
    canonical_of_call,
    forward_with_taps,
)


@forward_with_taps.register
def _(layer: nn.MultiheadAttention, weights: Weights, named_args: dict[str, Any], tap: Tap) -> tuple[Tensor, Any]:
    inputs = [_swap_batch_first(layer, named_args[name]) for name in ("query", "key", "value")]
    projected = []
    for name, x, weight, bias in zip("qkv", inputs, *_input_projections(layer, weights), strict=True):
        y = F.linear(x, weight, bias)
        extra_token = weights.get(f"bias_{name}")  # torch appends bias_k and bias_v as one more position
        y = y if extra_token is None else torch.cat([y, extra_token.expand(1, y.shape[1], -1)])
        projected.append(tap(name, x, y))
    z_TNE, attention_weights = _attention(layer, named_args, projected)
    y_TNE = F.linear(z_TNE, weights["out_proj.weight"], weights.get("out_proj.bias"))
    return _swap_batch_first(layer, tap("out", z_TNE, y_TNE)), attention_weights


def _swap_batch_first(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Exchange the first two dimensions if the layer has the batch first: attention is computed sequence first."""
    return x.transpose(0, 1) if layer.batch_first else x


def _input_projections(layer: nn.MultiheadAttention, weights: Weights) -> tuple[list[Tensor], list[Any]]:
    """Return the weights and the biases of the projections of queries, keys and values."""
    bias, packed = weights.get("in_proj_bias"), weights.get("in_proj_weight")
    separate = [f"{name}_proj_weight" for name in "qkv"]
    projections = [weights[name] for name in separate] if packed is None else packed.chunk(3)
    return list(projections), [None] * 3 if bias is None else list(bias.chunk(3))


def _attention(layer: nn.MultiheadAttention, named_args: dict[str, Any], projected: list[Tensor]) -> tuple[Tensor, Any]:
    """Return the heads' outputs, concatenated, and the attention weights, from torch's own attention.

    Identity matrices replace the projections, because queries, keys and values are projected already.
    """
    q_TNE, k_SNE, v_SNE = projected
    eye_EE = torch.eye(layer.embed_dim, dtype=q_TNE.dtype, device=q_TNE.device)
    extra = int(layer.bias_k is not None)
    masks: dict[str, Any] = {
        name: None if named_args[name] is None else F.pad(_match_dtype(named_args[name], q_TNE), (0, extra))
        for name in ("key_padding_mask", "attn_mask")
    }
    return F.multi_head_attention_forward(
        q_TNE, k_SNE, v_SNE, layer.embed_dim, layer.num_heads, None, None, None, None, layer.add_zero_attn,
        layer.dropout, eye_EE, None, layer.training, need_weights=named_args["need_weights"],
        use_separate_proj_weight=True, q_proj_weight=eye_EE, k_proj_weight=eye_EE, v_proj_weight=eye_EE,
        average_attn_weights=named_args["average_attn_weights"], is_causal=named_args["is_causal"], **masks,
    )  # fmt: skip


def _match_dtype(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like) if mask.is_floating_point() else mask


@canonical.register
def _(layer: nn.MultiheadAttention, x: Any, grad_y: Any) -> Canonical:
    return canonical_of_call(layer, x, grad_y)


@canonical_from_uncalled.register
def _(layer: nn.MultiheadAttention, inputs: UncalledTensors, grads: UncalledTensors) -> Canonical:
    (z_NTE,), (g_NTE,) = inputs["out"].transpose(1, 2), grads["out"].transpose(1, 2)
    contributions: dict[str, Contribution] = {
        "out_proj.weight": weight_grads(z_NTE, g_NTE),
        "out_proj.bias": bias_grads(g_NTE),
    }
    if layer.bias_k is not None:
        contributions |= {f"bias_{name}": PerSampleGrads(grads[name][0, -1, :, None, None]) for name in "kv"}
    calls = [(inputs[name][0], grads[name][0]) for name in "qkv"]
    pairs = [(x.transpose(0, 1), g[: len(x)].transpose(0, 1)) for x, g in calls]
    contributions["in_proj_bias"] = PerSampleGrads(torch.cat([g.sum(1) for _, g in pairs], 1))
    return contributions | _input_weight_grads(layer, pairs)


def _input_weight_grads(layer: nn.MultiheadAttention, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Contribution]:
    """Return the contributions to the weights of queries, keys and values, from the inputs and gradients of each."""
    if layer.in_proj_weight is None:
        return {f"{name}_proj_weight": weight_grads(x, g) for name, (x, g) in zip("qkv", pairs, strict=True)}
    positions = max(g.shape[1] for _, g in pairs)
    a_NGPI, g_NGPO = (
        torch.stack([F.pad(t, (0, 0, 0, positions - t.shape[1])) for t in ts], 1) for ts in zip(*pairs, strict=True)
    )
    return {"in_proj_weight": OuterProducts(a_NGPI, g_NGPO)}
