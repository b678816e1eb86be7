"""The entries of a summary: one for each parameter of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.optim.summary.names import folded_names


@dataclass(frozen=True)
class ParameterSummary:
    """How one parameter is updated.

    Attributes:
        parameter: the parameter's name in the model.
        layer: the name of the module that owns it; ``""`` for the model itself.
        shape: the parameter's shape.
        step: whether its gradient is preconditioned, or it takes the SGD step, or it is frozen (``requires_grad`` is
            False) and does not change.
        block: the name of its Fisher block, ``"."`` for the model itself; ``"-"`` if it is in none.
        representation: how its curvature is stored, with notes; or why there is none. ``D 64² ⊗ 300`` is the form of D
            with scaled damping: a matrix for 64 outputs of a group, a diagonal for 300 inputs.
        kernels: the kernels of its products; ``name:torch`` or ``name:config`` if a plan overrides one.
        bytes: the memory, in bytes, of what is stored for it between refreshes: TENGraD's J and D, a baseline's state.
    """

    parameter: str
    layer: str
    shape: tuple[int, ...]
    step: Literal["preconditioned", "SGD", "frozen"]
    block: str
    representation: str
    kernels: str
    bytes: int

    @property
    def name(self) -> str:
        """Return the parameter's name within its layer."""
        return self.parameter.removeprefix(f"{self.layer}.") if self.layer else self.parameter


@dataclass(frozen=True)
class Stored:
    """What an optimizer stores for one parameter; the fields are those of `ParameterSummary`."""

    block: str
    representation: str
    kernels: str = "-"
    bytes: int = 0


def entries_of(
    layers: Sequence[LayerParams], model: nn.Module, stored: Callable[[LayerParams, str], Stored | str]
) -> tuple[ParameterSummary, ...]:
    """Return an entry for each parameter of ``layers``.

    Args:
        layers: the layers of the optimizer.
        model: the model, which may have a parameter under several names.
        stored: from a layer and a parameter's name within it to what is stored for it; or to why nothing is, and the
            parameter takes the SGD step.
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)

    def entry(layer: LayerParams, param_name: str) -> ParameterSummary:
        parameter, full_name = layer.parameters[param_name], layer.full_name_of(param_name)
        found = stored(layer, param_name) if layer.why_sgd is None else layer.why_sgd
        step: Literal["preconditioned", "SGD", "frozen"] = "preconditioned"
        if not parameter.requires_grad:
            step, found = "frozen", _frozen(found)
        elif isinstance(found, str):
            step, found = "SGD", Stored("-", f"sgd ({found})", "update_")
        others = folded_names(name for name in names.get(parameter, ()) if name != full_name)
        representation = ", ".join(filter(None, (found.representation, f"also {others}" if others else "")))
        own = (step, found.block, representation, found.kernels, found.bytes)
        return ParameterSummary(full_name, layer.name, tuple(parameter.shape), *own)

    return tuple(entry(layer, param_name) for layer in layers for param_name in layer.parameters)


def _frozen(found: Stored | str) -> Stored:
    """Return the entry of a frozen parameter: what the last refresh stored if it was frozen after that, or nothing."""
    if isinstance(found, str) or found.kernels == "-":
        return Stored("-", "frozen")
    return replace(found, representation=f"frozen, {found.representation}")


@dataclass(frozen=True)
class Others:
    """How many parameters of the model an optimizer was not given, and how many of these are frozen."""

    parameters: int
    frozen: int


def others_of(layers: Sequence[LayerParams], model: nn.Module) -> Others:
    """Return how many parameters the model has beside those of ``layers``."""
    own = {parameter for layer in layers for parameter in layer.parameters.values()}
    others = [parameter for parameter in model.parameters() if parameter not in own]
    return Others(len(others), sum(not parameter.requires_grad for parameter in others))
