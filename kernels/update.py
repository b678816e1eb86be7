"""The parameter update, and what the ops share that compute Jᵀ w and apply the update in the same kernel.

Such an op reads and writes each parameter once in a step.

Dimensions: N samples; in a parameter's view O outputs of all groups, T taps of a convolution's kernel (1 for other
layers) and I inputs of a tap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cpu_update import update_all_
from .dispatch import expect
from .pointer_table import Entries, fields, strides
from .spec import Example, normal

# The fields that every table of an op with an update has after FIRST_TILE: addresses, and the strides of three of them.
(
    PARAM, MOMENTUM, GRAD, W, DAMPING, SETTINGS,
    PARAM_STRIDES, MOMENTUM_STRIDES, GRAD_STRIDES,
) = fields(6, strides=3, after=1)  # fmt: skip
AFTER_UPDATE = 16  # one more than the index of the last of these


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """Update a parameter and its momentum in place along a direction (docs/math.md, M6).

    d = direction + weight_decay θ;  m ← momentum m + d;  θ ← (1 − lr shrink) θ − lr s,
    where the step s is d + momentum m with ``nesterov``, and m without.

    Args:
        param: θ, of any shape.
        momentum_buffer: m, of the parameter's shape.
        direction: the direction of the step, of the parameter's shape.
        settings: [lr, momentum, weight_decay, shrink] as one tensor, so that a learning-rate schedule recompiles
            nothing. ``shrink`` is the decoupled weight decay, ``weight_decay`` the coupled one.
        nesterov: whether the step looks ahead by the momentum.
    """
    update_all_([(param, momentum_buffer, direction, settings)], nesterov)


def expect_update(param: Tensor, momentum_buffer: Tensor, grad: Tensor, damping: Tensor, settings: Tensor) -> None:
    """Raise ValueError unless momentum and gradient have the parameter's shape, damping [] and settings [4]."""
    expect("momentum_OTI", momentum_buffer, *param.shape)
    expect("grad_OTI", grad, *param.shape)
    expect("damping", damping)
    expect("settings", settings, 4)


POINTERS = {PARAM: 0, MOMENTUM: 1, GRAD: 2}
"""The arguments of such an op that these fields point to."""


def update_columns(entries: Entries, unit: int) -> dict[Any, list[int]]:
    """Return the table's columns of the fields above, but for the addresses, with strides in units of ``unit``."""
    columns: dict[Any, list[int]] = {}
    for argument, field in enumerate((PARAM_STRIDES, MOMENTUM_STRIDES, GRAD_STRIDES)):
        columns |= strides(field, entries.of(argument), unit)
    return columns


def example_parameters(
    o: int, t: int, i: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return a parameter, its momentum and its gradient, with the strides of a convolution's weight."""
    tensors = [normal(o, i, t, dtype=dtype, device=device, seed=seed) for seed in (3, 4, 5)]
    return [x_OIT.mT for x_OIT in tensors]


def example_numbers(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return w_N, a damping and settings."""
    w_N = normal(n, dtype=torch.float32, device=device, seed=6)
    return w_N, torch.tensor(0.3, device=device), torch.tensor([0.1, 0.9, 0.01, 0.02], device=device)


def example_param_dtype(dtype: torch.dtype, half: bool) -> torch.dtype:
    """Return the dtype of the parameters in an example whose J has another: float32, or half precision."""
    if not half:
        return torch.float32
    return torch.float16 if dtype == torch.float32 else dtype


def update_examples(make: Callable[..., tuple[Any, ...]]) -> dict[str, Example]:
    """Return the examples that every op with an update is tried with.

    ``make`` takes a dtype, a device, ``nesterov``, and ``half``: whether the parameters are in half precision.
    """
    return {
        "heavy ball": partial(make, nesterov=False, half=False),
        "nesterov": partial(make, nesterov=True, half=False),
        "half-precision parameters": partial(make, nesterov=False, half=True),
    }
