"""The update rule's settings as tensors, so that a schedule changes numbers and not code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What the update rule reads besides tensors of the parameter's shape: see `kernels.update_`.

    ``settings`` is [lr, momentum, weight_decay, shrink]; ``divisor`` (0-dim) divides the direction: the block's
    damping α in (F + α I)⁻¹ V = (V − Jᵀ w) / α.
    """

    settings: Tensor
    divisor: Tensor
    nesterov: bool


def settings_of(group: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return a parameter group's [lr, momentum, weight_decay, shrink], beside ``like``, in float32 at least."""
    decay, lr = group["weight_decay"], group["lr"]
    coupled, shrink = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
    numbers = [0.0 if isinstance(lr, Tensor) else lr, group["momentum"], coupled, shrink]
    dtype = torch.promote_types(like.dtype, torch.float32)
    settings = torch.tensor(numbers, dtype=dtype, device=like.device)
    if isinstance(lr, Tensor):
        settings[0] = lr.reshape(())  # stays on the device: reading it back would stop the host
    return settings
