"""nn.MultiheadAttention: its projections are linear layers that it never calls.

Dimensions: N samples, T queries, S keys, E features, P positions, G groups, I inputs and O outputs of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Canonical, Contribution, OuterProducts, PerSampleGrads, canonical
from tengrad_triton.layers.dense import dense, summed
from tengrad_triton.layers.uncalled import Stacked, Tap, Weights, forward_with_taps, of_call, rows_within


@forward_with_taps.register
def _(layer: nn.MultiheadAttention, weights: Weights, named: dict[str, Any], tap: Tap) -> tuple[Tensor, Any]:
    inputs = [_samples_second(layer, named[name]) for name in ("query", "key", "value")]
    projected = []
    for name, x, w, b in zip("qkv", inputs, *_of_inputs(layer, weights), strict=True):
        y = F.linear(x, w, b)
        token = weights.get(f"bias_{name}")
        # bias_k and bias_v are one more position, as the layer itself puts it there
        y = y if token is None else torch.cat([y, token.expand(1, y.shape[1], -1)])
        projected.append(tap(name, x, y))
    z_TNE, attended = _attention(layer, named, projected)
    y_TNE = F.linear(z_TNE, weights["out_proj.weight"], weights.get("out_proj.bias"))
    return _samples_second(layer, tap("out", z_TNE, y_TNE)), attended


def _samples_second(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return x.transpose(0, 1) if layer.batch_first else x


def _of_inputs(layer: nn.MultiheadAttention, weights: Weights) -> tuple[list[Tensor], list[Any]]:
    """Return the weights and biases of queries, keys and values."""
    bias, packed = weights.get("in_proj_bias"), weights.get("in_proj_weight")
    separate = [f"{name}_proj_weight" for name in "qkv"]
    of_each = [weights[name] for name in separate] if packed is None else packed.chunk(3)
    return list(of_each), [None] * 3 if bias is None else list(bias.chunk(3))


def _attention(layer: nn.MultiheadAttention, named: dict[str, Any], projected: list[Tensor]) -> tuple[Tensor, Any]:
    """Return what torch's own attention makes of queries, keys and values: heads side by side, weights if wanted."""
    q_TNE, k_SNE, v_SNE = projected
    eye_EE = torch.eye(layer.embed_dim, dtype=q_TNE.dtype, device=q_TNE.device)
    extra = int(layer.bias_k is not None)
    masks: dict[str, Any] = {
        name: None if named[name] is None else F.pad(_widened(named[name], q_TNE), (0, extra))
        for name in ("key_padding_mask", "attn_mask")
    }
    return F.multi_head_attention_forward(
        q_TNE, k_SNE, v_SNE, layer.embed_dim, layer.num_heads, None, None, None, None, layer.add_zero_attn,
        layer.dropout, eye_EE, None, layer.training, need_weights=named["need_weights"],
        use_separate_proj_weight=True, q_proj_weight=eye_EE, k_proj_weight=eye_EE, v_proj_weight=eye_EE,
        average_attn_weights=named["average_attn_weights"], is_causal=named["is_causal"], **masks,
    )  # fmt: skip


def _widened(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like) if mask.is_floating_point() else mask


@canonical.register
def _(layer: nn.MultiheadAttention, x: Any, grad_y: Any) -> Canonical:
    return of_call(layer, x, grad_y)


@rows_within.register
def _(layer: nn.MultiheadAttention, seen: Stacked, by: Stacked) -> Canonical:
    (z_NTE,), (g_NTE,) = seen["out"].transpose(1, 2), by["out"].transpose(1, 2)
    form: dict[str, Contribution] = {"out_proj.weight": dense(z_NTE, g_NTE), "out_proj.bias": summed(g_NTE)}
    if layer.bias_k is not None:
        form |= {f"bias_{name}": PerSampleGrads(by[name][0, -1, :, None, None]) for name in "kv"}
    of_inputs = [(seen[name][0], by[name][0]) for name in "qkv"]
    pairs = [(x.transpose(0, 1), g[: len(x)].transpose(0, 1)) for x, g in of_inputs]
    form["in_proj_bias"] = PerSampleGrads(torch.cat([g.sum(1) for _, g in pairs], 1))
    if layer.in_proj_weight is None:
        return form | {f"{name}_proj_weight": dense(x, g) for name, (x, g) in zip("qkv", pairs, strict=True)}
    positions = max(g.shape[1] for _, g in pairs)
    a, g = (
        torch.stack([F.pad(t, (0, 0, 0, positions - t.shape[1])) for t in ts], 1) for ts in zip(*pairs, strict=True)
    )
    return form | {"in_proj_weight": OuterProducts(a, g)}
