"""What an optimizer keeps of each parameter: its momentum, and a wide copy of one in a narrower type.

bfloat16 holds 8 bits of a number, so a step of less than a 512th of a weight would change nothing. Steps therefore
change a copy in the type of the curvature (`wide_dtype`), and the parameter is the copy, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTUM, COPY = "momentum_buffer", "wide_copy"
"""The keys of an optimizer's state."""
State = dict[str, Any]
Kept = tuple[Tensor, str, Tensor]
"""A parameter, a key of its state, and what the state has there."""


class WideCopies:
    """The copies of those narrower parameters that the present step updates."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, parameter: Tensor, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what a step updates in the parameter's place, its copy in this type or itself, and its momentum.

        Where the parameter is not the copy, rounded, somebody has written to it: the copy takes its value there.
        """
        momentum = momentum_of(parameter, state, dtype)
        if parameter.dtype == dtype:
            state.pop(COPY, None)  # the model may have been converted
            return parameter, momentum
        wide, copy = parameter.detach().to(dtype), state.get(COPY)
        if copy is None or (copy.shape, copy.device, copy.dtype) != (wide.shape, wide.device, dtype):
            copy = state[COPY] = wide
        else:
            copy.copy_(torch.where(copy.to(parameter.dtype) == parameter, copy, wide))
        self._pairs.append((parameter, copy))
        return copy, momentum

    def forget(self) -> None:
        """Begin another step."""
        self._pairs.clear()

    def write_back(self) -> None:
        """Give each parameter the value of its copy, rounded to the nearest."""
        for parameter, copy in self._pairs:
            parameter.copy_(copy)


def momentum_of(parameter: Tensor, state: State, dtype: torch.dtype) -> Tensor:
    """Return a parameter's momentum in this type; zeros at first."""
    buffer: Tensor | None = state.get(MOMENTUM)
    if buffer is None:
        buffer = state[MOMENTUM] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    elif (buffer.dtype, buffer.device) != (dtype, parameter.device):  # the model may have been converted
        buffer = state[MOMENTUM] = buffer.to(parameter.device, dtype)
    return buffer


def fill(parameter: Tensor, state: State, dtype: torch.dtype) -> None:
    """Make what is not there yet of a parameter's momentum in this type, and of its copy where it has another type.

    A copy that is there stays, also where the parameter is another number: what belongs to it may not be loaded yet.
    """
    momentum_of(parameter, state, dtype)
    if parameter.dtype == dtype:
        state.pop(COPY, None)  # the model may have been converted
    elif COPY not in state:
        state[COPY] = parameter.detach().to(dtype)


def kept(state: Mapping[Tensor, State]) -> list[Kept]:
    """Return the momenta and the copies, with their parameters and keys."""
    return [(parameter, key, own[key]) for parameter, own in state.items() for key in (MOMENTUM, COPY) if key in own]


def restore(
    state: Mapping[Tensor, State],
    before: Sequence[Kept],
    groups: Sequence[Mapping[str, Any]],
    saved: Mapping[str, Any],
) -> None:
    """Give an optimizer's new state the saved numbers, at the addresses of `kept` before, which captured graphs read.

    torch has rounded them to the types of the parameters.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for key in {MOMENTUM, COPY} & saved["state"].get(index, {}).keys():
            state[parameter][key] = saved["state"][index][key].to(parameter.device, copy=True)
    for parameter, key, buffer in before:
        new = state[parameter].get(key, torch.zeros_like(buffer) if key == MOMENTUM else None)
        if new is not None and (new.dtype, new.device) == (buffer.dtype, buffer.device):
            state[parameter][key] = buffer.copy_(new)
