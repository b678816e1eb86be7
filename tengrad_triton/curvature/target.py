"""What an update reads of a parameter beside its gradient: its momentum, and the settings of its group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams


class Target(NamedTuple):
    """A parameter to be updated in place, with all that stays the same from step to step: all but its gradient.

    Attributes:
        layer: the name of the module that owns the parameter.
        param_name: the parameter's name within that module.
        parameter: updated in place.
        momentum: of the parameter's shape, updated in place.
        settings: [lr, momentum, weight_decay, shrink] of the parameter's group (see `GroupSettings`); shrink is the
            decoupled weight decay.
        nesterov: whether the step looks ahead along the momentum.
        spring: μ of SPRING (docs/math.md, M13); 0 without it.
        rate: the learning rate's index: targets with the same index have the same learning rate (see `rate_indices`).
        group: the index of its parameter group.
        whole: the shape of the whole parameter; None if ``parameter`` is all of it.
    """

    layer: str
    param_name: str
    parameter: Tensor
    momentum: Tensor
    settings: Tensor
    nesterov: bool
    spring: float
    rate: int
    group: int
    whole: torch.Size | None = None

    @property
    def lr(self) -> Tensor:
        """Return the learning rate."""
        return self.settings[0]

    @property
    def size(self) -> int:
        """Return the entries of the whole parameter."""
        return (self.whole or self.parameter.shape).numel()

    def add_spring(self, grad: Tensor, damping: Tensor | float, times_d: Callable[[Tensor], Tensor]) -> Tensor:
        """Return V + α μ D φ for the gradient V, where φ is the last direction (SPRING); ``times_d`` multiplies by D.

        φ ← μ φ + (F + α D)⁻¹ (V − μ F φ) equals (F + α D)⁻¹ (V + α μ D φ), which needs no product with F (M13).
        """
        return grad + (damping * self.spring) * times_d(self.momentum) if self.spring else grad

    def in_scratch(self, settings: Tensor) -> Target:
        """Return it with zeros for parameter and momentum, which the update makes lr d and d (`scratch_settings`)."""
        theta, momentum = torch.zeros_like(self.parameter), torch.zeros_like(self.parameter)
        return self._replace(parameter=theta, momentum=momentum, settings=settings, nesterov=False)


def scratch_settings(settings: Tensor) -> Tensor:
    """Return [−lr, 0, 0, 0]: applied to zeros, the update writes lr d to the parameter and d to the momentum."""
    negated = torch.zeros_like(settings)
    negated[0] -= settings[0]
    return negated


Trained = tuple[LayerParams, str, tuple[Tensor, Tensor, Tensor]]
"""A layer, a parameter's name within it, and its (parameter, momentum, gradient)."""
TensorsOf = Callable[[LayerParams, str], tuple[Tensor, Tensor, Tensor] | None]
"""From a layer and a parameter's name within it to (parameter, momentum, gradient); None where there is no gradient."""
Groups = Sequence[Mapping[str, Any]]
"""For each parameter group its ``nesterov``, ``spring`` (where the optimizer has it) and ``maximize``."""


def trained_of(layers: Sequence[LayerParams], tensors_of: TensorsOf) -> list[Trained]:
    """Return every parameter that has a gradient, in the order of the layers, with its tensors."""
    trained = []
    for layer in layers:
        for param_name in layer.parameters:
            if (tensors := tensors_of(layer, param_name)) is not None:
                trained.append((layer, param_name, tensors))
    return trained


def rate_indices(groups: Groups) -> tuple[int, ...]:
    """Return for each group the index of the first group whose learning rate is known to be the same.

    Tensors count as the same where they are one object: to compare their numbers would wait for the device.
    """
    first: dict[Hashable, int] = {}
    rates = [("tensor", id(group["lr"])) if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]
    return tuple(first.setdefault(rate, index) for index, rate in enumerate(rates))


def targets_of(
    trained: Sequence[Trained], groups: Groups, settings: Sequence[Tensor], rates: Sequence[int]
) -> list[Target]:
    """Return a target for every parameter of `trained_of`.

    Args:
        trained: the parameters, with their tensors.
        groups: the parameter groups.
        settings: `GroupSettings.of` each group.
        rates: `rate_indices` of the groups.
    """

    def target_of(layer: LayerParams, name: str, parameter: Tensor, momentum: Tensor) -> Target:
        index, whole = layer.groups[name], layer.parameters[name].shape
        own, nesterov = (parameter, momentum, settings[index]), groups[index]["nesterov"]
        return Target(layer.name, name, *own, nesterov, groups[index].get("spring", 0.0), rates[index], index, whole)

    return [target_of(layer, name, parameter, momentum) for layer, name, (parameter, momentum, _) in trained]


def grads_of(trained: Sequence[Trained], groups: Groups) -> list[Tensor]:
    """Return the gradient of what is minimized with respect to every parameter of `trained_of`."""
    return [-grad if groups[layer.groups[name]]["maximize"] else grad for layer, name, (_, _, grad) in trained]


class RememberedTargets:
    """The targets of the last step, as long as nothing but the gradients has changed.

    So whatever is derived from a list of targets, such as views of parameters, can be remembered for that list.

    Args:
        check: is called with what has changed, before it is remembered; raises if a step cannot update it.
    """

    def __init__(self, check: Callable[[Sequence[Trained]], None]) -> None:
        self._check = check
        self._key: list[Hashable] = []
        self._targets: list[Target] = []

    def of(self, trained: Sequence[Trained], groups: Groups, settings: Sequence[Tensor]) -> list[Target]:
        """Return an equal list to that of `targets_of`: the same object as in the last step where that is equal."""
        # The user may change a group.
        rates = rate_indices(groups)
        key: list[Hashable] = [
            *rates,
            *((id(x), group["nesterov"], group.get("spring")) for x, group in zip(settings, groups, strict=True)),
        ]
        for layer, param_name, (parameter, momentum, _) in trained:
            # `model.to` gives a parameter another address, and `parameter.data` may be replaced by a view of itself.
            key += (layer.name, param_name)
            for x in (parameter, momentum):
                key += (x.data_ptr(), x.dtype, x.shape, x.stride())
        if key != self._key:
            self._check(trained)
            self._key, self._targets = key, targets_of(trained, groups, settings, rates)
        return self._targets


def bounded_scale(total: Tensor, bound: float) -> Tensor:
    """Return min(1, (bound / total)^½), the factor that keeps a step's squared norm ``total`` within ``bound``.

    The result stays on the device; nothing waits for it.
    """
    return (bound / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1.0)


def average_numbers(group: Mapping[str, Any], steps: int) -> tuple[float, float]:
    """Return share and correction of a group's `Average` after so many steps."""
    momentum = group["momentum"]
    exponent = steps + (2 if group["nesterov"] else 1)
    return 1.0 - momentum, 1.0 / (1.0 - momentum**exponent)


class Average(NamedTuple):
    """How a parameter group averages gradients before D⁻¹, as Adam does with Nesterov's look-ahead (M17).

    m ← (1 − c) m + c V;   V̂ = r ((1 − c) m + c V) if the step looks ahead, else r m.

    Attributes:
        share: c = 1 − momentum.
        correction: r, for the steps at which m still remembers its first value, 0.
        nesterov: whether the step looks ahead.
    """

    share: float | Tensor
    correction: float | Tensor
    nesterov: bool

    @classmethod
    def of_group(cls, group: Mapping[str, Any], steps: int) -> Average | None:
        """Return the average of a group after so many steps; None with SPRING."""
        return None if group.get("spring") else cls(*average_numbers(group, steps), group["nesterov"])

    def of(self, momenta: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return V̂ of each gradient V, from the means m before the step: a step that fails leaves them as they are."""
        c = self.share * (2.0 - self.share) if self.nesterov else self.share  # of V in the new m, and once more
        if isinstance(c, Tensor):  # a number that a compiled function reads
            return [self.correction * (m + (g - m) * c.to(g.dtype)) for m, g in zip(momenta, grads, strict=True)]
        found = grads if c == 1.0 else list(torch._foreach_lerp(momenta, grads, c))
        if self.correction != 1.0:  # with c = 1 it is 1
            torch._foreach_mul_(found, self.correction)
        return found

    def remember_(self, momenta: list[Tensor], grads: list[Tensor]) -> None:
        """Update the means m in place."""
        if isinstance(self.share, Tensor):
            for m, g in zip(momenta, grads, strict=True):
                m.add_((g - m) * self.share.to(g.dtype))  # torch.lerp has two forms, which takes twice as long
        elif self.share == 1.0:
            torch._foreach_copy_(momenta, grads)
        else:
            torch._foreach_lerp_(momenta, grads, self.share)


PlacesOfAverages = Sequence[tuple[Average, Sequence[int]]]
"""Every average, with the indices of its targets."""


def places_of_averages(targets: Sequence[Target], averages: Sequence[Average | None]) -> PlacesOfAverages:
    """Return the averages of the targets' groups; nothing where momentum is part of the update."""
    if not averages:
        return []
    of_group: dict[int, list[int]] = {}
    for place, target in enumerate(targets):
        of_group.setdefault(target.group, []).append(place)
    pairs = [(averages[group], places) for group, places in of_group.items()]  # Dynamo knows no := in a comprehension
    return [(average, places) for average, places in pairs if average is not None]


def averaged(targets: Sequence[Target], grads: Sequence[Tensor], places_of: PlacesOfAverages) -> Sequence[Tensor]:
    """Return V̂ of every gradient V, by the `Average` of its target's group; V where there is none."""
    if not places_of:
        return grads
    found = list(grads)
    for average, places in places_of:
        own = average.of([targets[place].momentum for place in places], [grads[place] for place in places])
        for place, mean in zip(places, own, strict=True):
            found[place] = mean
    return found


def remember_(targets: Sequence[Target], grads: Sequence[Tensor], places_of: PlacesOfAverages) -> None:
    """Update the means m of the gradients V, which `averaged` has read."""
    for average, places in places_of:
        average.remember_([targets[place].momentum for place in places], [grads[place] for place in places])


class _Numbers:
    """Some numbers as one tensor that keeps its address.

    A schedule changes the numbers in place, so a captured graph reads the new ones. Each number is written by a fill
    kernel: a copy from the host would wait for the device.
    """

    def __init__(self) -> None:
        self._numbers, self._tensor = tuple[float, ...](), torch.empty(0)

    def of(self, numbers: tuple[float, ...], group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        """Return the numbers in this type, on the device of a parameter group's."""
        tensor, device = self._tensor, _device_of(group)
        if (tensor.numel(), tensor.dtype, tensor.device) != (len(numbers), dtype, device):
            tensor = self._tensor = torch.zeros(len(numbers), dtype=dtype, device=device)
            self._numbers = (0.0,) * len(numbers)
        for index, (old, new) in enumerate(zip(self._numbers, numbers, strict=True)):
            if old != new:
                tensor[index].fill_(new)
        self._numbers = numbers
        return tensor


class GroupSettings:
    """A parameter group's numbers as tensors that keep their addresses, in the type of the curvature."""

    def __init__(self) -> None:
        self._settings, self._average = _Numbers(), _Numbers()

    def of(self, group: Mapping[str, Any], dtype: torch.dtype, averages: bool = False) -> Tensor:
        """Return the group's present [lr, momentum, weight_decay, shrink].

        The momentum is 0 where it is no part of the update: with SPRING, and where ``averages`` says that gradients are
        averaged before D⁻¹.
        """
        decay, lr = group["weight_decay"], group["lr"]
        coupled, shrink = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
        momentum = 0.0 if averages or group.get("spring") else group["momentum"]
        numbers = (0.0 if isinstance(lr, Tensor) else lr, momentum, coupled, shrink)
        tensor = self._settings.of(numbers, group, dtype)
        if isinstance(lr, Tensor):
            tensor[0].copy_(lr.reshape(()))
        return tensor

    def average(self, group: Mapping[str, Any], dtype: torch.dtype, steps: int) -> Tensor:
        """Return [share, correction] of the group's `Average` after so many steps."""
        return self._average.of(average_numbers(group, steps), group, dtype)


def _device_of(group: Mapping[str, Any]) -> torch.device:
    """Return the device of a group's numbers; a group may be empty."""
    return next((p.device for p in group["params"] if p.requires_grad), torch.device("cpu"))
