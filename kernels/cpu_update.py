"""The tuned PyTorch code of the parameter update, and of the ops that update along (grad − Jᵀ w) / damping.

Dimensions: N samples; in a parameter's view O outputs of all groups, T taps of a convolution's kernel (1 for other
layers) and I inputs of a tap. The index t counts weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .conv_geometry import conv_geometries
from .cpu import add_weighted_outer_products_, expansions, has_one_position, weighted_outer_products
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
    """Compute Jᵀ w from factors, and update; where no direction is kept, products are added to the parameters."""
    ratios = _negated_ratios(w, dampings)
    if _keeps_no_direction(params, momenta, grads) and all(map(_adds_in_place, params, a, g)):
        rates = _step_along_(params, grads, dampings, settings)
        for param, a_NGPI, g_NGPO, u_N, lr in zip(params, a, g, ratios, rates, strict=True):
            add_weighted_outer_products_(param.view(len(param), -1), a_NGPI, g_NGPO, u_N * -lr)
        return
    factors = zip(a, g, ratios, strict=True)
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
    if _keeps_no_direction(params, momenta, grads):
        rates = _step_along_(params, grads, dampings, settings)
        for t, added in expanded:
            own = added.reshape(params[t].shape)
            params[t].add_(
                own if _same_layout(own, params[t]) else torch.empty_like(params[t]).copy_(own), alpha=-rates[t]
            )
        return
    update_all_(
        (
            (params[t], momenta[t], _direction(grads[t], added.reshape(grads[t].shape), dampings[t]), settings[t])
            for t, added in expanded
        ),
        nesterov,
    )


def _keeps_no_direction(params: Sequence[Tensor], momenta: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Return whether each momentum is the gradient itself, which the caller gives up, and is none (`_Launch`)."""
    same = all(momentum is grad for momentum, grad in zip(momenta, grads, strict=True))
    return same and not torch.compiler.is_compiling() and all(p.is_cpu and p.dtype in _FUSED_DTYPES for p in params)


def _adds_in_place(param: Tensor, a_NGPI: Tensor, g_NGPO: Tensor) -> bool:
    return has_one_position(g_NGPO) and param.is_contiguous() and param.dtype == a_NGPI.dtype == g_NGPO.dtype


def _step_along_(
    params: Sequence[Tensor], grads: Sequence[Tensor], dampings: Sequence[Tensor], settings: Sequence[Tensor]
) -> list[float]:
    """Update along grad / damping alone, with one call for all parameters of equal numbers; return each one's lr."""
    numbers = {id(one): one.tolist() for one in settings}
    alike: dict[tuple[float, float], list[int]] = {}
    for t, damping in enumerate(torch.stack(tuple(dampings)).tolist()):
        lr, _, weight_decay, shrink = numbers[id(settings[t])]
        alike.setdefault((1 - lr * (weight_decay + shrink), -lr / damping), []).append(t)
    for (kept, rate), places in alike.items():
        own = [params[t] for t in places]
        if kept != 1.0:
            torch._foreach_mul_(own, kept)
        torch._foreach_add_(own, [grads[t] for t in places], alpha=rate)
    return [numbers[id(one)][0] for one in settings]


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
