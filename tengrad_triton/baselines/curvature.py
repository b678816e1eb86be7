"""The curvature of the baselines: a state for every layer, the step along it, and its form in a checkpoint.

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tengrad_triton.baselines.kronecker import KroneckerLayer
from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.target import Target, bounded_scale
from tengrad_triton.kernels import update_
from tengrad_triton.profiling import phase


class LayerState(Protocol):
    """What is kept of one layer: a frozen dataclass of tensors, and of further dataclasses of tensors."""

    @property
    def a_GII(self) -> Tensor:
        """Return the running input factor A, which every baseline keeps."""

    @property
    def representation(self) -> str:
        """Return what is kept, for the summary."""

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return the preconditioned gradient [G, O, I]."""


S = TypeVar("S", bound=LayerState)


@dataclass(frozen=True)
class Curvature(Generic[S]):
    """What a refresh leaves behind for the steps until the next one.

    Attributes:
        layers: every layer that has Kronecker factors, and its state.
        batches: how many batches the running factors have taken in.
        failures: how many factorizations have failed so far, a whole number on the device.
    """

    layers: Mapping[KroneckerLayer, S]
    batches: int
    failures: Tensor


def step_(layers: Sequence[tuple[KroneckerLayer, Any]], targets: Sequence[Target], kl_clip: float | None) -> None:
    """Update every target along its preconditioned gradient, or along its gradient where its layer has no factors.

    Args:
        layers: every layer that has Kronecker factors, and its `LayerState`.
        targets: the parameters, updated in place.
        kl_clip: κ; all preconditioned gradients d are scaled by min(1, (κ / Σ lr² ⟨d, ∇L⟩)^½) (Ba, Grosse and Martens
            2017, section 5). None for no bound.
    """
    with phase("solve"):
        directions = _directions(layers, targets)
        if kl_clip is not None and directions:
            inner = [
                t.settings[0].square() * (directions[t.layer, t.label] * t.grad).sum()
                for t in targets
                if (t.layer, t.label) in directions
            ]
            torch._foreach_mul_(list(directions.values()), bounded_scale(torch.stack(inner).sum(), kl_clip))
    with phase("update"):
        for t in targets:
            update_(t.parameter, t.momentum, directions.get((t.layer, t.label), t.grad), t.settings, t.nesterov)


def _directions(
    layers: Sequence[tuple[KroneckerLayer, Any]], targets: Sequence[Target]
) -> dict[tuple[str, str], Tensor]:  # fmt: skip
    """Return the preconditioned gradients, by the module's name and the parameter's name within it."""
    grads: dict[str, dict[str, Tensor]] = {}
    for target in targets:
        grads.setdefault(target.layer, {})[target.label] = target.grad
    directions = {}
    for layer, state in layers:
        own = grads.get(layer.module, {})
        if all(label in own for label in layer.labels):
            solved_GOI = state.solve(layer.to_matrix(own, len(state.a_GII), state.a_GII.dtype))
            for label, direction in layer.from_matrix(solved_GOI, own).items():
                directions[layer.module, label] = direction
    return directions


def pack_curvature(curvature: Curvature[S]) -> dict[str, Any]:
    """Return a curvature as nested dictionaries of tensors and numbers."""
    layers = {
        layer.name: {"layer": [layer.module, layer.weight, layer.bias], "state": tensors_of(state)}
        for layer, state in curvature.layers.items()
    }
    return {"layers": layers, "batches": curvature.batches, "failures": curvature.failures}


def unpack_curvature(
    packed: Mapping[str, Any],
    layers: Sequence[LayerParams],
    state_of: Callable[[dict[str, Any]], S],
    device: torch.device,
) -> Curvature[S]:
    """Return the curvature that `pack_curvature` described.

    Args:
        packed: the description.
        layers: of the optimizer; each state goes to the device of its layer's weight.
        state_of: from the fields of a layer's state to the state.
        device: where failures are counted.

    Raises:
        ValueError: the curvature belongs to other layers than these.
    """
    known = {layer.name: layer.parameters for layer in layers}
    restored = {}
    for name, entry in packed["layers"].items():
        layer = KroneckerLayer(*entry["layer"])
        if layer.module not in known or not set(layer.labels) <= set(known[layer.module]):
            raise ValueError(
                f"the state holds curvature of {name}, but this optimizer's layers are "
                f"{', '.join(known) or 'none'}: it was saved for another model"
            )
        restored[layer] = state_of(_moved(entry["state"], known[layer.module][layer.weight].device))
    return Curvature(restored, packed["batches"], packed["failures"].to(device))


def tensors_of(state: Any) -> dict[str, Any]:
    """Return the fields of a layer's state by name, further dataclasses as dictionaries too."""
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: tensors_of(value) if is_dataclass(value) else value for name, value in named.items()}


def nbytes_of(state: Any) -> int:
    """Return the bytes of all tensors of a layer's state."""
    return sum(value.nbytes if isinstance(value, Tensor) else nbytes_of(value) for value in vars(state).values())


def _moved(tensors: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else _moved(value, device)
        for name, value in tensors.items()
    }
