"""The curvature of the baselines: one state for each layer, the step along them, and their form in a checkpoint.

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
    """The state of one layer: a frozen dataclass, whose fields are tensors or further dataclasses of tensors."""

    @property
    def a_GII(self) -> Tensor:
        """Return the running input factor A, which is part of every baseline's state."""

    @property
    def representation(self) -> str:
        """Return a description of the state, for the summary."""

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return the preconditioned gradient [G, O, I]."""


S = TypeVar("S", bound=LayerState)


@dataclass(frozen=True)
class KroneckerCurvature(Generic[S]):
    """What a refresh computes, and the steps until the next one use.

    Attributes:
        layers: each layer that has Kronecker factors, with its state.
        batches: how many batches the running factors contain.
        failures: how many factorizations have failed so far, as a 0-dim integer tensor on the model's device.
    """

    layers: Mapping[KroneckerLayer, S]
    batches: int
    failures: Tensor


def step_(
    layers: Sequence[tuple[KroneckerLayer, Any]],
    targets: Sequence[Target],
    grads: Sequence[Tensor],
    kl_clip: float | None,
) -> None:
    """Update each target along its preconditioned gradient, or along its gradient if its layer has no factors.

    Args:
        layers: each layer that has Kronecker factors, with its `LayerState`.
        targets: the parameters, updated in place.
        grads: the gradient of what is minimized with respect to each.
        kl_clip: κ; all preconditioned gradients d are scaled by min(1, (κ / Σ δᵀ F δ)^½) with δ = lr d (Ba, Grosse and
            Martens 2017, section 5). None for no bound.
    """
    with phase("solve"):
        directions = _directions(layers, targets, grads)
        if kl_clip is not None and directions:
            torch._foreach_mul_(
                list(directions.values()), bounded_scale(_squared_norm(layers, targets, grads, directions), kl_clip)
            )
    with phase("update"):
        for t, grad in zip(targets, grads, strict=True):
            update_(t.parameter, t.momentum, directions.get((t.layer, t.param_name), grad), t.settings, t.nesterov)


def _squared_norm(
    layers: Sequence[tuple[KroneckerLayer, Any]],
    targets: Sequence[Target],
    grads: Sequence[Tensor],
    directions: Mapping[tuple[str, str], Tensor],
) -> Tensor:
    """Return Σ δᵀ F δ with δ = lr d: lr² ⟨d, ∇L⟩ for a layer with one learning rate, as F d = ∇L.

    Where the learning rates of weight and bias differ, the layer's `squared_norm` takes products with F.
    """
    by_name = {(t.layer, t.param_name): (t, grad) for t, grad in zip(targets, grads, strict=True)}
    parts = []
    for layer, state in layers:
        names = [(layer.module, param_name) for param_name in layer.param_names]
        if names[0] not in directions:
            continue
        if len({by_name[name][0].rate for name in names}) == 1:
            lr = by_name[names[0]][0].lr
            parts += [lr.square() * (directions[name] * by_name[name][1]).sum() for name in names]
        else:
            steps = {name[1]: by_name[name][0].lr * directions[name] for name in names}
            parts.append(state.squared_norm(layer.to_matrix(steps, len(state.a_GII), state.a_GII.dtype)))
    return torch.stack(parts).sum()


def _directions(
    layers: Sequence[tuple[KroneckerLayer, Any]], targets: Sequence[Target], grads: Sequence[Tensor]
) -> dict[tuple[str, str], Tensor]:  # fmt: skip
    """Return the preconditioned gradients, by the module's name and the parameter's name within it."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for target, grad in zip(targets, grads, strict=True):
        by_layer.setdefault(target.layer, {})[target.param_name] = grad
    directions = {}
    for layer, state in layers:
        own = by_layer.get(layer.module, {})
        if all(param_name in own for param_name in layer.param_names):
            solved_GOI = state.solve(layer.to_matrix(own, len(state.a_GII), state.a_GII.dtype))
            for param_name, direction in layer.from_matrix(solved_GOI, own).items():
                directions[layer.module, param_name] = direction
    return directions


def pack_curvature(curvature: KroneckerCurvature[S]) -> dict[str, Any]:
    """Return a curvature as nested dictionaries of tensors, names and numbers."""
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
) -> KroneckerCurvature[S]:
    """Return the curvature that `pack_curvature` stored.

    Args:
        packed: the result of `pack_curvature`.
        layers: the optimizer's layers; each state goes to the device of its layer's weight.
        state_of: the function from a state's fields, by name, to the state.
        device: the device on which failures are counted.

    Raises:
        ValueError: the curvature belongs to other layers than these.
    """
    known = {layer.name: layer.parameters for layer in layers}
    restored = {}
    for name, entry in packed["layers"].items():
        layer = KroneckerLayer(*entry["layer"])
        if layer.module not in known or not set(layer.param_names) <= set(known[layer.module]):
            raise ValueError(
                f"the state has a curvature of {name}, but this optimizer's layers are "
                f"{', '.join(known) or 'none'}: it was saved for another model"
            )
        restored[layer] = state_of(_moved(entry["state"], known[layer.module][layer.weight].device))
    return KroneckerCurvature(restored, packed["batches"], packed["failures"].to(device))


def tensors_of(state: Any) -> dict[str, Any]:
    """Return the fields of a layer's state by name, with dictionaries in place of further dataclasses."""
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
