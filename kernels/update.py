"""The parameter update, which the kernels of expand carry in their epilogue: a step reads and writes a parameter once.

Dimensions: N samples; in a parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .spec import expect, normal, widen

_HELD = 1 << 16  # entries of directions that wait for each other, as many as a cache holds
_FUSED = (torch.float32, torch.float64)  # what torch's fused SGD takes on a CPU


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """The update rule, in place: coupled weight decay, then momentum, then the step; θ shrinks first if decoupled.

    d = direction + weight_decay θ;  m ← momentum m + d;  θ ← (1 − lr shrink) θ − lr (m, or d + momentum m if Nesterov)
    with ``settings = [lr, momentum, weight_decay, shrink]`` as one tensor, so that a schedule recompiles nothing.
    """
    update_all_([(param, momentum_buffer, direction, settings)], nesterov)


State = tuple[Tensor, Tensor, Tensor, Tensor]
"""What `update_` takes: a parameter, its momentum, a direction, and settings."""


def update_all_(states: Iterable[State], nesterov: bool) -> None:
    """`update_` of several, the small ones together.

    ``states`` may be made as they are read: a large direction is used up before the next one is there.
    """
    waiting: dict[tuple[int, torch.dtype], list[State]] = {}
    held = 0
    for state in states:
        param, momentum_buffer, direction, settings = state
        if not _is_flat(param, momentum_buffer, direction):
            _update_(*state, nesterov)
            continue
        waiting.setdefault((id(settings), param.dtype), []).append(state)
        held += param.numel()
        if held >= _HELD:
            _fused_updates_(waiting.values(), nesterov)
            held, waiting = 0, {}
    _fused_updates_(waiting.values(), nesterov)


def _fused_updates_(groups: Iterable[Sequence[State]], nesterov: bool) -> None:
    """`update_` by torch's fused SGD, in one call for all that have the same settings, where it can say these."""
    for alike in groups:
        params, momenta, directions, (settings, *_) = map(list, zip(*alike, strict=True))
        lr, momentum, weight_decay, shrink = settings.tolist()
        if not momentum or (weight_decay and shrink):
            for state in alike:
                _update_(*state, nesterov)
            continue
        for param in params if shrink else ():
            param.mul_(1 - lr * shrink)
        torch._fused_sgd_(
            params, directions, momenta, lr=lr, momentum=momentum, weight_decay=weight_decay,
            dampening=0.0, nesterov=nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip


def _update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    lr, momentum, weight_decay, shrink = settings.unbind()
    # All in place: on a CPU a temporary of the parameter's size costs more than the arithmetic, five times measured.
    momentum_buffer.mul_(momentum).add_(direction).addcmul_(param, weight_decay)
    if nesterov:
        param.mul_(1 - lr * (shrink + weight_decay)).addcmul_(direction, -lr).addcmul_(momentum_buffer, -lr * momentum)
    else:
        param.mul_(1 - lr * shrink).addcmul_(momentum_buffer, -lr)


def _is_flat(param: Tensor, momentum_buffer: Tensor, direction: Tensor) -> bool:
    """Whether torch's fused SGD on a CPU serves these, which reads memory in its order: dense ones, all alike."""
    if not param.is_cpu or param.dtype not in _FUSED or torch.compiler.is_compiling():
        return False
    if not (param.dtype == momentum_buffer.dtype == direction.dtype):
        return False
    if param.is_contiguous() and momentum_buffer.is_contiguous() and direction.is_contiguous():
        return True
    reach = sum((size - 1) * step for size, step in zip(param.shape, param.stride(), strict=True))
    return reach == param.numel() - 1 and _lie_alike(param, momentum_buffer) and _lie_alike(param, direction)


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have their entries in the same order in memory."""
    return x.stride() == y.stride() or all(
        size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True)
    )


def negated_ratios(w: Sequence[Tensor], dampings: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return −w / damping of each, in float32 at least."""
    return torch._foreach_div([widen(w_N) for w_N in w], torch._foreach_neg(list(dampings)))


def update_along_(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    expanded: Iterable[tuple[int, Tensor]],
    dampings: Sequence[Tensor],
    settings: Sequence[Tensor],
    nesterov: bool,
) -> None:
    """`update_` along (grad − Jᵀ w) / damping = grad / damping + Jᵀ (−w / damping): so no pass over the larger side.

    ``expanded`` yields (index, Jᵀ (−w / damping)), each a tensor of its own with its entries in the order of (O, K, I).
    """
    update_all_(
        (
            (params[t], momenta[t], _direction(grads[t], added.reshape(grads[t].shape), dampings[t]), settings[t])
            for t, added in expanded
        ),
        nesterov,
    )


def _direction(grad: Tensor, added: Tensor, damping: Tensor) -> Tensor:
    if _lie_alike(added, grad):
        return added.addcdiv_(grad, damping)
    # It has to lie in memory as the gradient does, or arithmetic on the two would crawl.
    return (grad / damping).add_(added)


def expect_update(param: Tensor, momentum_buffer: Tensor, grad: Tensor, damping: Tensor, settings: Tensor) -> None:
    """Raise ValueError unless what an update takes belongs together."""
    expect("momentum_OKI", momentum_buffer, *param.shape)
    expect("grad_OKI", grad, *param.shape)
    expect("damping", damping)
    expect("settings", settings, 4)


def example_parameters(o: int, k: int, i: int, device: torch.device) -> list[Tensor]:
    """Return a parameter, its momentum and its gradient."""
    tensors = [normal(o, i, k, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4, 5)]
    return [x_OIK.mT for x_OIK in tensors]  # as a convolution's weight comes


def example_numbers(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return w_N, a damping and settings."""
    w_N = normal(n, dtype=torch.float32, device=device, seed=6)
    return w_N, torch.tensor(0.3, device=device), torch.tensor([0.1, 0.9, 0.01, 0.02], device=device)
