"""What an update reads of a parameter: its momentum, its gradient, and the settings of its group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams


class Target(NamedTuple):
    """A parameter to be updated in place, with all that `kernels.update_` takes but the direction.

    Attributes:
        layer: the name of the module that owns the parameter.
        param_name: the parameter's name within that module.
        parameter: updated in place.
        momentum: of the parameter's shape, updated in place.
        grad: the gradient of what is minimized.
        settings: [lr, momentum, weight_decay, shrink] of the parameter's group (see `GroupSettings`); shrink is the
            decoupled weight decay.
        nesterov: whether the step looks ahead along the momentum.
        spring: μ of SPRING (docs/math.md, M13); 0 without it.
        group: the index of the parameter's group.
    """

    layer: str
    param_name: str
    parameter: Tensor
    momentum: Tensor
    grad: Tensor
    settings: Tensor
    nesterov: bool
    spring: float
    group: int

    @property
    def lr(self) -> Tensor:
        """Return the learning rate, the first of the settings."""
        return self.settings[0]

    def add_spring(self, damping: Tensor | float) -> Target:
        """Return the target with V + α μ φ in place of its gradient V, where φ is the last direction (SPRING).

        φ ← μ φ + (F + α I)⁻¹ (V − μ F φ) equals (F + α I)⁻¹ (V + α μ φ), which needs no product with F (M13).
        """
        if not self.spring:
            return self
        return self._replace(grad=self.grad + (damping * self.spring) * self.momentum)

    def in_scratch(self, settings: Tensor) -> Target:
        """Return the target with zeros for its parameter and momentum: the update makes them lr d and d.

        ``settings`` is `scratch_settings` of the target's own.
        """
        zeros = (torch.zeros_like(self.grad), torch.zeros_like(self.grad))
        return self._replace(parameter=zeros[0], momentum=zeros[1], settings=settings, nesterov=False)


def scratch_settings(settings: Tensor) -> Tensor:
    """Return [−lr, 0, 0, 0]: applied to zeros, the update writes lr d to the parameter and d to the momentum."""
    negated = torch.zeros_like(settings)
    negated[0] -= settings[0]
    return negated


TensorsOf = Callable[[LayerParams, str], tuple[Tensor, Tensor, Tensor] | None]
"""From a layer and a parameter's name within it to (parameter, momentum, gradient); None where there is no gradient."""


def targets_of(
    layers: Sequence[LayerParams],
    groups: Sequence[Mapping[str, Any]],
    settings: Sequence[Tensor],
    tensors_of: TensorsOf,
) -> list[Target]:
    """Return a target for every parameter that has a gradient, in the order of the layers.

    Args:
        layers: with the parameters to be updated.
        groups: for each parameter group its ``nesterov``, ``spring`` (where the optimizer has it) and ``maximize``.
        settings: for each parameter group its `GroupSettings.of`.
        tensors_of: where a parameter, its momentum and its gradient are.
    """
    targets = []
    for layer in layers:
        group = groups[layer.group]
        for param_name in layer.parameters:
            tensors = tensors_of(layer, param_name)
            if tensors is not None:
                parameter, momentum, grad = tensors
                grad = -grad if group["maximize"] else grad
                state = (parameter, momentum, grad, settings[layer.group])
                spring = group.get("spring", 0.0)
                targets.append(Target(layer.name, param_name, *state, group["nesterov"], spring, layer.group))
    return targets


def bounded_scale(total: Tensor, bound: float) -> Tensor:
    """Return min(1, (bound / total)^½), the factor that keeps a step's squared norm ``total`` within ``bound``.

    The result stays on the device; nothing waits for it.
    """
    return (bound / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1.0)


class GroupSettings:
    """A parameter group's [lr, momentum, weight_decay, shrink] as one tensor that keeps its address.

    A schedule changes the numbers in place, so a captured graph reads the new ones. Each number is written by a fill
    kernel: a copy from the host would wait for the device.
    """

    def __init__(self) -> None:
        self._numbers: tuple[float, ...] = ()
        self._tensor = torch.empty(0)

    def of(self, group: Mapping[str, Any]) -> Tensor:
        """Return the group's present numbers on its device, in float64 for float64 parameters and else in float32."""
        decay, lr = group["weight_decay"], group["lr"]
        device = next((p.device for p in group["params"]), torch.device("cpu"))  # a group may be empty
        coupled, shrink = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
        momentum = 0.0 if group.get("spring") else group["momentum"]  # SPRING's momentum is part of the gradient
        numbers = (0.0 if isinstance(lr, Tensor) else lr, momentum, coupled, shrink)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in group["params"]) else torch.float32
        if (self._tensor.numel(), self._tensor.dtype, self._tensor.device) != (4, dtype, device):
            self._tensor, self._numbers = torch.zeros(4, dtype=dtype, device=device), (0.0,) * 4
        for index, (old, new) in enumerate(zip(self._numbers, numbers, strict=True)):
            if old != new:
                self._tensor[index].fill_(new)
        self._numbers = numbers
        if isinstance(lr, Tensor):
            self._tensor[0].copy_(lr.reshape(()))
        return self._tensor


def fill_on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers as a float64 tensor, written by fill kernels: a copy from the host would wait for the device."""
    filled = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
    return torch.stack(filled) if filled else torch.empty(0, dtype=torch.float64, device=device)
