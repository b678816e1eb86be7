"""The layers of a model, the layers whose calls are recorded, and the blocks of the Fisher matrix.

A layer here is a module together with the parameters that it owns directly. A parameter of several modules belongs to
the first of them. A block of the Fisher matrix is one layer, or several layers that are solved together (docs/math.md,
M2 and M11).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tengrad_triton.layers import (
    call_parameters,
    is_uncalled,
    only_moves_entries,
    owned_parameters,
    require_exact_gradient,
    why_no_rule,
)
from tengrad_triton.sharding.modules import sharded_modules


@dataclass(frozen=True)
class LayerParams:
    """A layer and the parameters that it owns directly.

    Attributes:
        name: the module's name in the model.
        layer: the module itself.
        parameters: the parameters, by their names within the module.
        groups: the index of each parameter's group in the optimizer, by the parameter's name within the module.
        why_sgd: why they take the SGD step, or None if they have rows.
    """

    name: str
    layer: nn.Module
    parameters: Mapping[str, nn.Parameter]
    groups: Mapping[str, int]
    why_sgd: str | None

    def trained(self) -> list[str]:
        """Return the names of the parameters that require gradients at present."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    def full_name_of(self, parameter: str) -> str:
        """Return the name in the model of the parameter whose name within the layer is ``parameter``."""
        return full_name(self.name, parameter)


def full_name(layer: str, parameter: str) -> str:
    """Return a parameter's name in the model from the name of its layer and its name within the layer."""
    return f"{layer}.{parameter}" if layer else parameter


BlocksChoice = Literal["layer", "network"] | Sequence[Sequence[str]]
"""Which layers form a block (M11): each layer, all layers, or those of each list. A name includes submodules."""


def fisher_blocks_of(choice: BlocksChoice, layers: Sequence[LayerParams], names: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each block by its name, the names of its layers.

    Args:
        choice: which layers form a block; a layer in no list is a block by itself.
        layers: all layers of the model.
        names: the layers with rows; the others are left out.

    Raises:
        ValueError: a list names a module without parameters, or a layer is in several lists.
    """
    if choice == "layer":
        return {name: [name] for name in names}
    if choice == "network":
        return {"network": list(names)} if names else {}
    all_names = [layer.name for layer in layers]
    lists = [[name for entry in entries for name in all_names if _is_inside(name, entry)] for entries in choice]
    unknown = [entry for entries in choice for entry in entries if not any(_is_inside(n, entry) for n in all_names)]
    if unknown:
        raise ValueError(
            f"blocks names {', '.join(map(repr, unknown))}, but no such module has parameters: use names of layers "
            f"({', '.join(map(repr, all_names))}) or of modules that contain them"
        )
    twice = [name for name, count in Counter(name for block in lists for name in block).items() if count > 1]
    if twice:
        raise ValueError(f"blocks names {', '.join(map(repr, twice))} more than once: put each into one list only")
    with_rows = [[name for name in block if name in names] for block in lists]
    listed = {name for block in lists for name in block}
    alone = {name: [name] for name in names if name not in listed}
    return {" + ".join(entries): block for entries, block in zip(choice, with_rows, strict=True) if block} | alone


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose calls are recorded, because they give rows.

    Attributes:
        layer: the module.
        parameters: the parameters that its calls use, by their names within it. If two modules share a parameter, both
            have it here; `LayerParams` has it only for the first one, which owns it.
        has_rule: whether a rule covers the layer. If not, its rows come from running it again.
        takes_half_precision: whether the rule gets tensors in half precision as they are; otherwise in float32.
    """

    layer: nn.Module
    parameters: Mapping[str, Tensor]
    has_rule: bool
    takes_half_precision: bool


def wide_dtype(layers: Sequence[LayerParams]) -> torch.dtype:
    """Return the type of curvatures, momenta and updates: float64 if a trained parameter has it, or else float32."""
    parameters = (p for layer in layers for p in layer.parameters.values())
    return torch.float64 if any(p.dtype == torch.float64 and p.requires_grad for p in parameters) else torch.float32


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what `find_layer_params` and `find_captured_layers` depend on: it differs if the model has changed.

    `fully_shard` changes the parameters of a model all the time, between whole ones and their parts.
    """
    is_sharded = bool(sharded_modules(model))
    return tuple(
        (name, module, type(module), tuple((k, None if is_sharded else id(p)) for k, p in module._parameters.items()))
        for name, module in model.named_modules()
    )


def find_captured_layers(model: nn.Module, layers: Sequence[LayerParams]) -> dict[str, CapturedLayer]:
    """Return, by name, the layers whose calls use parameters with rows, even if another layer owns these."""
    with_rows = {p for layer in layers if layer.why_sgd is None for p in layer.parameters.values()}
    modules, captured = dict(model.named_modules()), {}
    for name, module in modules.items():
        used = {} if is_uncalled(name, modules) else call_parameters(module)
        parameters = {param_name: p for param_name, p in used.items() if p in with_rows}
        if parameters:
            captured[name] = CapturedLayer(module, parameters, why_no_rule(module) is None, only_moves_entries(module))
    return captured


def find_layer_params(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], *, rows_without_rule: bool
) -> list[LayerParams]:
    """Return every layer that owns parameters of ``groups``, and an entry for each group's parameters without a layer.

    A parameter without entries is left out: there is nothing to update.

    Args:
        model: the model itself, not compiled.
        groups: the optimizer's parameter groups.
        rows_without_rule: whether parameters that no rule covers have rows; otherwise they take the SGD step.

    Raises:
        ValueError: an option of a module with trainable parameters makes its gradient differ from the derivative of
            the loss.
    """
    group_of = {p: index for index, group in enumerate(groups) for p in group["params"] if is_lazy(p) or p.numel()}
    modules = dict(model.named_modules())
    why_uncovered = {} if rows_without_rule else _uncovered(modules)
    layers = []
    for name, module in modules.items():
        owned = {key: p for key, p in owned_parameters(name, modules).items() if p in group_of}
        if not owned:
            continue
        if any(p.requires_grad for p in owned.values()):  # a step checks what is thawed later
            require_exact_gradient(name, module)
        own_groups = {key: group_of[p] for key, p in owned.items()}
        for parameter in set(owned.values()):
            del group_of[parameter]
        why = next((why_uncovered[p] for p in owned.values() if p in why_uncovered), None)
        layers.append(LayerParams(name, module, owned, own_groups, why))
    return layers + _params_of_no_module(model, group_of)


def _params_of_no_module(model: nn.Module, group_of: Mapping[nn.Parameter, int]) -> list[LayerParams]:
    """Return an entry for each group that has parameters which the model does not contain."""
    layers = []
    for index in set(group_of.values()):
        parameters = [p for p, group in group_of.items() if group == index]
        named = {str(k): parameter for k, parameter in enumerate(parameters)}
        own_groups, why = dict.fromkeys(named, index), "not a parameter of the model"
        layers.append(LayerParams(f"group {index}", model, named, own_groups, why))
    return layers


def _uncovered(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Return, for each parameter that a layer without a rule uses, why no rule covers that layer."""
    why: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        reason = None if is_uncalled(name, modules) else why_no_rule(module)
        if reason is not None:
            why |= {p: reason for p in call_parameters(module).values() if p not in why}
    return why
