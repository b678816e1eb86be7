"""Steps under `torch.amp.GradScaler`, which multiplies the loss by a number and skips steps with infinite gradients.

A scaler hands an optimizer that can deal with it the scale and what it found, as the attributes ``grad_scale`` and
``found_inf``, for the duration of one step. So the optimizer learns of a skipped step, and divides in float32: a scaler
itself refuses to divide gradients in float16. After `unscale_` the scaler hands over no scale; but it is the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.capture.hooks import Capture


class LossScale(NamedTuple):
    """What a scaler says of a step.

    Attributes:
        skips: whether it has found infinite gradients, so that no step is taken.
        divisor: the scale, as long as the gradients are not divided by it; otherwise None.
    """

    skips: bool = False
    divisor: Tensor | None = None

    def unscaled(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient of the loss itself, in this type."""
        wide = grad if grad.dtype == dtype else grad.to(dtype)
        return wide if self.divisor is None else wide / self.divisor.to(wide.device)


NOT_SCALED = LossScale()


@contextmanager
def loss_scale(optimizer: torch.optim.Optimizer, capture: Capture) -> Iterator[LossScale]:
    """Return a context for a step, with what its scaler says of it; ``capture.loss_scale`` is set.

    Of a step that is skipped nothing remains, and the labels of the next batch are those that this one had. After a
    step the gradients are divided by the scale. After an error they are as they were, and the scaler may try again.

    Raises:
        RuntimeError: the loop has divided the gradients, by a scale that is not known, but the rows need it.
    """
    capture.loss_scale = 1.0
    found_inf, divisor = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        yield NOT_SCALED
        return
    try:
        if found_inf.item():
            capture.take_back()
            yield LossScale(skips=True)
            return
        capture.loss_scale = _scale_of_caller() if divisor is None else float(divisor.item())
        if capture.loss_scale is None and capture.reads_loss:
            raise RuntimeError(
                "fisher='empirical' takes rows from the scaled loss, but the gradients are divided already and no "
                "torch.amp.GradScaler calls this step: call scaler.step(optimizer), or use fisher='sampled' or 'exact'"
            )
        yield LossScale(divisor=divisor)
    except BaseException:
        for name in ("found_inf", "grad_scale"):  # a scaler leaves them, and multiplies its next scale by this one
            vars(optimizer).pop(name, None)
        raise
    if divisor is not None:
        _divide_gradients(optimizer, divisor)


def _scale_of_caller() -> float | None:
    """Return the scale of the `GradScaler` whose method `step` calls this step; None without one."""
    code = torch.amp.GradScaler.step.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else float(frame.f_locals["self"].get_scale())


def _divide_gradients(optimizer: torch.optim.Optimizer, scale: Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
