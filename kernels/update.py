"""The parameter update, which the kernels of expand carry in their epilogue: a step reads and writes a parameter once.

Dimensions: N samples; in a parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import expect, normal


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """The update rule, in place: coupled weight decay, then momentum, then the step; θ shrinks first if decoupled.

    d = direction + weight_decay θ;  m ← momentum m + d;  θ ← (1 − lr shrink) θ − lr (m, or d + momentum m if Nesterov)
    with ``settings = [lr, momentum, weight_decay, shrink]`` as one tensor, so that a schedule recompiles nothing.
    """
    if _is_flat(param, momentum_buffer, direction):
        lr, momentum, weight_decay, shrink = settings.tolist()
        if momentum and not (weight_decay and shrink):  # what torch's fused step can say
            if shrink:
                param.mul_(1 - lr * shrink)
            torch._fused_sgd_(
                [param], [direction], [momentum_buffer], lr=lr, momentum=momentum, weight_decay=weight_decay,
                dampening=0.0, nesterov=nesterov, maximize=False, is_first_step=False,
            )  # fmt: skip
            return
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
    reach = sum((size - 1) * step for size, step in zip(first.shape, first.stride(), strict=True))
    return reach == first.numel() - 1 and all(x.stride() == first.stride() and x.dtype == first.dtype for x in tensors)


def update_along(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    expanded: Tensor,
    nesterov: bool,
    divisor: Tensor,
    settings: Tensor,
) -> None:
    """`update_` along (grad − expanded) / divisor; ``expanded`` is used up, and lies over (O, K, I)."""
    expanded_OKI = expanded.reshape(param_OKI.shape)
    if expanded_OKI.stride() == grad_OKI.stride():
        direction = expanded_OKI.sub_(grad_OKI).div_(-divisor)
    else:  # the direction has to lie in memory as the gradient does, or arithmetic on the two would crawl
        direction = (grad_OKI - expanded_OKI).div_(divisor)
    update_(param_OKI, momentum_OKI, direction, settings, nesterov)


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
