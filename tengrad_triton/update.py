"""What an update takes: a parameter with its momentum and gradient, and its group's settings as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
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


def settings_of(group: Mapping[str, Any]) -> Tensor:
    """Return a parameter group's [lr, momentum, weight_decay, shrink] on its device, in float32 at least.

    As a tensor, so that a schedule changes numbers and not code.
    """
    decay, lr, parameters = group["weight_decay"], group["lr"], group["params"]
    coupled, shrink = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
    numbers = [0.0 if isinstance(lr, Tensor) else lr, group["momentum"], coupled, shrink]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    settings = torch.tensor(numbers, dtype=dtype, device=parameters[0].device)
    if isinstance(lr, Tensor):
        settings[0] = lr.reshape(())  # stays on the device: reading it back would stop the host
    return settings
