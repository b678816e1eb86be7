"""nn.MultiheadAttention: its projections are linear layers that it never calls.

What they saw and the derivatives by what they returned come from attention itself, done once more between them.

Dimensions: N samples, T queries, S keys, E features, P positions, G groups, I inputs and O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

from tengrad_triton.layers.dense import dense, summed
from tengrad_triton.layers.form import Call, Canonical, Explicit, Form, Outer, arguments, canonical
from tengrad_triton.layers.rerun import replayed


@canonical.register
def _(layer: nn.MultiheadAttention, x: Call, grad_y: list[Tensor | None]) -> Canonical:
    named = arguments(layer, x)
    inputs = [_samples_second(layer, named[name]) for name in ("query", "key", "value")]
    grads = [None if g is None else (_samples_second(layer, g) if k == 0 else g) for k, g in enumerate(grad_y)]
    projected = [_with_bias_token(layer, p, k) for k, p in enumerate(_projections(layer, inputs))]
    attend = _attention(layer, named, grads, projected[0])
    with replayed(x.rng, inputs[0].device):
        transformed: Any = vjp(attend, *projected)
    (z_TNE, *weights), pull = transformed
    w_EE = layer.out_proj.weight.detach().to(z_TNE)
    by_z = torch.zeros_like(z_TNE) if grads[0] is None else grads[0] @ w_EE
    by_weights = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads[1:], strict=True)]
    by_projection = pull((by_z, *by_weights))
    form: dict[str, Form] = _of_bias_tokens(layer, by_projection)
    form |= _of_inputs(layer, inputs, by_projection)
    grad_y_TNE = torch.zeros_like(z_TNE) if grads[0] is None else grads[0]
    z, g = z_TNE.transpose(0, 1), grad_y_TNE.transpose(0, 1)
    return form | {"out_proj.weight": dense(z, g), "out_proj.bias": summed(g)}


def _samples_second(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return x.transpose(0, 1) if layer.batch_first else x


def _weights(layer: nn.MultiheadAttention) -> list[Tensor]:
    packed = layer.in_proj_weight
    separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    return [w.detach() for w in (separate if packed is None else packed.chunk(3))]


def _projections(layer: nn.MultiheadAttention, inputs: list[Tensor]) -> list[Tensor]:
    """Return queries, keys and values."""
    bias = layer.in_proj_bias
    biases = [None] * 3 if bias is None else [b.detach().to(inputs[0]) for b in bias.chunk(3)]
    return [F.linear(x, w.to(x), b) for x, w, b in zip(inputs, _weights(layer), biases, strict=True)]


def _with_bias_token(layer: nn.MultiheadAttention, projected: Tensor, index: int) -> Tensor:
    """Return the projections with bias_k or bias_v as one more position, as the layer itself puts it there."""
    token = (None, layer.bias_k, layer.bias_v)[index]
    if token is None:
        return projected
    return torch.cat([projected, token.detach().to(projected).expand(1, projected.shape[1], -1)])


def _attention(
    layer: nn.MultiheadAttention, named: dict[str, Any], grads: list[Tensor | None], like: Tensor
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Return torch's own attention between the projections, (q, k, v) -> heads side by side, weights if wanted."""
    eye_EE = torch.eye(layer.embed_dim, dtype=like.dtype, device=like.device)
    extra = int(layer.bias_k is not None)
    masks = {
        name: None if named[name] is None else F.pad(_widened(named[name], like), (0, extra))
        for name in ("key_padding_mask", "attn_mask")
    }

    def attend(q_TNE: Tensor, k_SNE: Tensor, v_SNE: Tensor) -> tuple[Tensor, ...]:
        outputs = F.multi_head_attention_forward(
            q_TNE, k_SNE, v_SNE, layer.embed_dim, layer.num_heads, None, None, None, None, layer.add_zero_attn,
            layer.dropout, eye_EE, None, layer.training, need_weights=named["need_weights"],
            use_separate_proj_weight=True, q_proj_weight=eye_EE, k_proj_weight=eye_EE, v_proj_weight=eye_EE,
            average_attn_weights=named["average_attn_weights"], is_causal=named["is_causal"], **masks,
        )  # fmt: skip
        return tuple(output for output in outputs[: len(grads)] if output is not None)

    return attend


def _widened(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like) if mask.is_floating_point() else mask


def _of_bias_tokens(layer: nn.MultiheadAttention, by_projection: Any) -> dict[str, Form]:
    if layer.bias_k is None:
        return {}
    last = {"bias_k": by_projection[1], "bias_v": by_projection[2]}
    return {label: Explicit(g[-1][:, None, None]) for label, g in last.items()}


def _of_inputs(layer: nn.MultiheadAttention, inputs: list[Tensor], by_projection: Any) -> dict[str, Form]:
    """Return what queries, keys and values contribute: three weights, or three groups of the packed one."""
    pairs = [(x.transpose(0, 1), g[: len(x)].transpose(0, 1)) for x, g in zip(inputs, by_projection, strict=True)]
    form: dict[str, Form] = {"in_proj_bias": Explicit(torch.cat([g.sum(1) for _, g in pairs], 1))}
    if layer.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return form | {name: dense(x, g) for name, (x, g) in zip(names, pairs, strict=True)}
    positions = max(g.shape[1] for _, g in pairs)
    a, g = (
        torch.stack([F.pad(t, (0, 0, 0, positions - t.shape[1])) for t in ts], 1) for ts in zip(*pairs, strict=True)
    )
    return form | {"in_proj_weight": Outer(a, g)}
