"""The tuned PyTorch code of the parameter update, and of the ops that update along (grad − Jᵀ w) / damping.

Dimensions: N samples; in a parameter's view O outputs of all groups, T taps of a convolution's kernel (1 for other
layers) and I inputs of a tap. The index t counts weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .conv_geometry import conv_geometries
from .cpu import expansions, weighted_outer_products
from .dispatch import widen

_WAITING_ENTRIES = 1 << 16  # directions are collected for one fused call up to this many entries, which a cache holds
_FUSED_DTYPES = (torch.float32, torch.float64)  # the dtypes that torch's fused SGD accepts on a CPU

Tensors = list[Tensor]
State = tuple[Tensor, Tensor, Tensor, Tensor]
"""The arguments of one `update_`: a parameter, its momentum, a direction, and settings [4]."""


def expand_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, a: Tensors, g: Tensors,
    w: Tensors, dampings: Tensors, settings: Tensors, nesterov: bool,
) -> None:  # fmt: skip
    """Compute Jᵀ w from factors, and update."""
    factors = zip(a, g, _negated_ratios(w, dampings), strict=True)
    expanded = (
        (t, weighted_outer_products(widen(a_NGPI), widen(g_NGPO), u_N))
        for t, (a_NGPI, g_NGPO, u_N) in enumerate(factors)
    )
    _update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


def expand_rows_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, j: Tensors,
    w: Tensors, dampings: Tensors, settings: Tensors, nesterov: bool,
) -> None:  # fmt: skip
    """Compute Jᵀ w from the rows of J, and update."""
    expanded = expansions(j, _negated_ratios(w, dampings))
    _update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


def expand_conv_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, x: Tensors, g: Tensors, sizes: list[int],
    w: Tensors, dampings: Tensors, settings: Tensors, nesterov: bool,
) -> None:  # fmt: skip
    """Compute Jᵀ w as the gradient of a convolution's weight for the output gradients w_n g_n, and update."""
    layers = zip(params, x, g, conv_geometries(sizes), _negated_ratios(w, dampings), strict=True)
    expanded = (
        (t, geometry.weight_grad(widen(x_NCHW), widen(g_NOHW) * u_N[:, None, None, None], weight.shape))
        for t, (weight, x_NCHW, g_NOHW, geometry, u_N) in enumerate(layers)
    )
    _update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


def _negated_ratios(w: Sequence[Tensor], dampings: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return −w / damping for each weight, in float32 at least."""
    return torch._foreach_div([widen(w_N) for w_N in w], torch._foreach_neg(list(dampings)))


def _update_along_(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    expanded: Iterable[tuple[int, Tensor]],
    dampings: Sequence[Tensor],
    settings: Sequence[Tensor],
    nesterov: bool,
) -> None:
    """Update along grad / damping + Jᵀ (−w / damping). Dividing w is cheaper than dividing Jᵀ w, which is larger.

    ``expanded`` yields (t, Jᵀ (−w / damping)) with entries in the order (O, T, I); these tensors are overwritten.
    """
    update_all_(
        (
            (params[t], momenta[t], _direction(grads[t], added.reshape(grads[t].shape), dampings[t]), settings[t])
            for t, added in expanded
        ),
        nesterov,
    )


def _direction(grad: Tensor, added: Tensor, damping: Tensor) -> Tensor:
    if _same_layout(added, grad):
        return added.addcdiv_(grad, damping)
    # The direction needs the gradient's layout in memory: arithmetic on two layouts is many times slower.
    return (grad / damping).add_(added)


def update_all_(states: Iterable[State], nesterov: bool) -> None:
    """Apply `update_` to several parameters; update small ones together in one call.

    ``states`` may compute its directions lazily: a large direction is used before the next one is computed.
    """
    waiting: dict[tuple[int, torch.dtype], list[State]] = {}
    entries = 0
    for state in states:
        param, momentum_buffer, direction, settings = state
        if not _can_fuse(param, momentum_buffer, direction):
            _update_(*state, nesterov)
            continue
        waiting.setdefault((id(settings), param.dtype), []).append(state)
        entries += param.numel()
        if entries >= _WAITING_ENTRIES:
            _fused_updates_(waiting.values(), nesterov)
            entries, waiting = 0, {}
    _fused_updates_(waiting.values(), nesterov)


def _fused_updates_(same_settings: Iterable[Sequence[State]], nesterov: bool) -> None:
    """Apply `update_` with torch's fused SGD, in one call for all states with the same settings.

    With both kinds of weight decay torch's SGD differs from `update_`, and is not used.
    """
    for states in same_settings:
        params, momenta, directions, (settings, *_) = map(list, zip(*states, strict=True))
        lr, momentum, weight_decay, shrink = settings.tolist()
        if weight_decay and shrink:
            for state in states:
                _update_(*state, nesterov)
            continue
        for param in params if shrink else ():
            param.mul_(1 - lr * shrink)
        if not momentum:  # m is d, and torch's SGD keeps no m
            if weight_decay:
                pairs = zip(directions, params, strict=True)
                directions = [direction.add(param, alpha=weight_decay) for direction, param in pairs]
            torch._foreach_copy_(momenta, directions)
            weight_decay, momenta, nesterov = 0.0, [], False
        torch._fused_sgd_(
            params, directions, momenta, lr=lr, momentum=momentum, weight_decay=weight_decay,
            dampening=0.0, nesterov=nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip


def _update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    lr, momentum, weight_decay, shrink = settings.unbind()
    # All in place: on a CPU a temporary tensor of the parameter's size takes five times as long as the arithmetic.
    momentum_buffer.mul_(momentum).add_(direction).addcmul_(param, weight_decay)
    if nesterov:
        param.mul_(1 - lr * (shrink + weight_decay)).addcmul_(direction, -lr).addcmul_(momentum_buffer, -lr * momentum)
    else:
        param.mul_(1 - lr * shrink).addcmul_(momentum_buffer, -lr)


def _can_fuse(param: Tensor, momentum_buffer: Tensor, direction: Tensor) -> bool:
    """Return whether torch's fused SGD can update these: on a CPU, it needs dense tensors with one layout and dtype."""
    if not param.is_cpu or param.dtype not in _FUSED_DTYPES or torch.compiler.is_compiling():
        return False
    if not (param.dtype == momentum_buffer.dtype == direction.dtype):
        return False
    if param.is_contiguous() and momentum_buffer.is_contiguous() and direction.is_contiguous():
        return True
    span = sum((size - 1) * step for size, step in zip(param.shape, param.stride(), strict=True))
    return span == param.numel() - 1 and _same_layout(param, momentum_buffer) and _same_layout(param, direction)


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors of one shape have their entries in the same order in memory."""
    return x.stride() == y.stride() or all(
        size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True)
    )
