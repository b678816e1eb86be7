"""The parameter update, which the kernels of expand carry in their epilogue: a step reads and writes a parameter once.

Dimensions: N samples; in a parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .spec import expect, normal

_LARGE = 1 << 16  # entries from which an update is no matter of what a call costs


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
    for state in states:
        param, settings = state[0], state[3]
        if not _is_flat(*state[:3]):
            _update_(*state, nesterov)
        elif param.numel() >= _LARGE:
            _fused_update_([state], nesterov)
        else:
            waiting.setdefault((id(settings), param.dtype), []).append(state)
    for alike in waiting.values():
        _fused_update_(alike, nesterov)


def _fused_update_(alike: Sequence[State], nesterov: bool) -> None:
    """`update_` by torch's fused SGD, in one call for all that have the same settings, where it can say these."""
    params, momenta, directions, (settings, *_) = map(list, zip(*alike, strict=True))
    lr, momentum, weight_decay, shrink = settings.tolist()
    if not momentum or (weight_decay and shrink):
        for state in alike:
            _update_(*state, nesterov)
        return
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


def _is_flat(*tensors: Tensor) -> bool:
    """Whether torch's fused SGD on a CPU serves these, which reads memory in its order: dense ones, all alike."""
    first = tensors[0]
    if not first.is_cpu or first.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    if any(x.dtype != first.dtype for x in tensors):
        return False
    if all(x.is_contiguous() for x in tensors):
        return True
    reach = sum((size - 1) * step for size, step in zip(first.shape, first.stride(), strict=True))
    return reach == first.numel() - 1 and all(_lie_alike(x, first) for x in tensors)


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have their entries in the same order in memory."""
    return x.stride() == y.stride() or all(
        size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True)
    )


def direction_of(grad_OKI: Tensor, combined: Callable[[Tensor], Tensor], w_N: Tensor, divisor: Tensor) -> Tensor:
    """Return (grad − Jᵀ w) / divisor, as grad / divisor + Jᵀ (−w / divisor): a pass less over the larger side.

    ``combined`` multiplies by Jᵀ, and returns a tensor of its own with its entries in the order of (O, K, I).
    """
    expanded_OKI = combined(w_N / -divisor).reshape(grad_OKI.shape)
    if _lie_alike(expanded_OKI, grad_OKI):
        return expanded_OKI.addcdiv_(grad_OKI, divisor)
    # It has to lie in memory as the gradient does, or arithmetic on the two would crawl.
    return (grad_OKI / divisor).add_(expanded_OKI)


def expect_update(param: Tensor, momentum_buffer: Tensor, grad: Tensor, divisor: Tensor, settings: Tensor) -> None:
    """Raise ValueError unless what an update takes belongs together."""
    expect("momentum_OKI", momentum_buffer, *param.shape)
    expect("grad_OKI", grad, *param.shape)
    expect("divisor", divisor)
    expect("settings", settings, 4)


def example_parameters(o: int, k: int, i: int, device: torch.device) -> list[Tensor]:
    """Return a parameter, its momentum and its gradient."""
    tensors = [normal(o, i, k, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4, 5)]
    return [x_OIK.mT for x_OIK in tensors]  # as a convolution's weight comes


def example_numbers(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return w_N, a divisor and settings."""
    w_N = normal(n, dtype=torch.float32, device=device, seed=6)
    return w_N, torch.tensor(0.3, device=device), torch.tensor([0.1, 0.9, 0.01, 0.02], device=device)
