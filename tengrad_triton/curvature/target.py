"""What an update takes: a parameter with its momentum and gradient, and its group's settings as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """A parameter to be updated in place, with all that the rule of `kernels.update_` reads but the direction.

    ``settings`` is [lr, momentum, weight_decay, shrink] of its group; ``block`` and ``label`` are where it belongs.
    """

    block: str
    label: str
    parameter: Tensor
    momentum: Tensor
    grad: Tensor
    settings: Tensor
    nesterov: bool
    spring: float = 0.0
    group: int = 0

    def add_spring(self, damping: Tensor | float) -> Target:
        """Return the target with V + α μ φ in place of its gradient V, where φ is the last direction (SPRING).

        φ ← μ φ + (F + α I)⁻¹ (V − μ F φ) is (F + α I)⁻¹ (V + α μ φ): the residual's formulation, without F φ (M13).
        """
        if not self.spring:
            return self
        return self._replace(grad=self.grad + (damping * self.spring) * self.momentum)


class Settings:
    """A parameter group's [lr, momentum, weight_decay, shrink], as one tensor that stays where it is.

    A schedule changes its numbers and not code, and a captured graph finds them where they were. They are written by
    kernels that carry the number along: copying them from the host would wait for the device.
    """

    def __init__(self) -> None:
        self._numbers: tuple[float, ...] = ()
        self._tensor = torch.empty(0)

    def of(self, group: Mapping[str, Any]) -> Tensor:
        """Return the group's numbers as they are now, on its device, in float32 at least."""
        decay, lr, first = group["weight_decay"], group["lr"], group["params"][0]
        coupled, shrink = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
        momentum = 0.0 if group.get("spring") else group["momentum"]  # SPRING's is part of the gradient
        numbers = (0.0 if isinstance(lr, Tensor) else lr, momentum, coupled, shrink)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in group["params"]) else torch.float32
        if (self._tensor.numel(), self._tensor.dtype, self._tensor.device) != (4, dtype, first.device):
            self._tensor, self._numbers = torch.zeros(4, dtype=dtype, device=first.device), (0.0,) * 4
        for index, (old, new) in enumerate(zip(self._numbers, numbers, strict=True)):
            if old != new:
                self._tensor[index].fill_(new)
        self._numbers = numbers
        if isinstance(lr, Tensor):
            self._tensor[0].copy_(lr.reshape(()))
        return self._tensor


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as a tensor in float64 without waiting for the device, as copying them from the host would."""
    filled = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
    return torch.stack(filled) if filled else torch.empty(0, dtype=torch.float64, device=device)


def table_update_(
    param: Tensor, momentum_buffer: Tensor, grad: Tensor, divisor: Tensor, settings: Tensor, nesterov: bool
) -> None:
    """`kernels.update_` along grad / divisor, without a tensor of the parameter's size for that direction."""
    lr, momentum, weight_decay, shrink = settings.unbind()
    divisor = divisor.to(grad.dtype)
    momentum_buffer.mul_(momentum).addcdiv_(grad, divisor).addcmul_(param, weight_decay)
    if nesterov:
        param.mul_(1 - lr * (shrink + weight_decay)).addcdiv_(grad, -divisor / lr)
        param.addcmul_(momentum_buffer, -lr * momentum)
    else:
        param.mul_(1 - lr * shrink).addcmul_(momentum_buffer, -lr)
