"""Steps under `torch.amp.GradScaler`, which multiplies the loss by a number and skips steps with infinite gradients.

A scaler hands an optimizer that can deal with it the scale and what it found, as the attributes ``grad_scale`` and
``found_inf``, for the duration of one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tengrad_triton.capture.hooks import Capture


def unscale_(optimizer: torch.optim.Optimizer, capture: Capture) -> bool:
    """Divide the gradients by the scale of the loss, unless the loop has done so; return whether to take the step.

    No step is taken where a `GradScaler` has found infinite gradients: what was captured is forgotten. Otherwise
    ``capture.loss_scale`` is set.

    Raises:
        RuntimeError: the loop has divided the gradients, by a scale that is not known, but the rows need it.
    """
    capture.loss_scale = 1.0
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        return True
    if found_inf.item():
        capture.forget()
        return False
    if scale is not None:
        capture.loss_scale = float(scale.item())
        _divide_gradients(optimizer, scale)
        return True
    capture.loss_scale = None
    if capture.reads_loss:
        raise RuntimeError(
            "fisher='empirical' takes rows from the scaled loss, but scaler.unscale_(optimizer) has hidden the scale "
            "from this step: call scaler.step(optimizer) without it, or use fisher='sampled' or 'exact'"
        )
    return True


def _divide_gradients(optimizer: torch.optim.Optimizer, scale: Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
