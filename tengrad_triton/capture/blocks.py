"""From a model to its layers, to the layers whose calls are recorded, and to the blocks of the Fisher matrix.

A layer here is a module together with the parameters that it owns directly. A parameter of several modules belongs to
the first of them. A block of the Fisher matrix is one layer, or several layers that are solved together (docs/math.md,
M2 and M11).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tengrad_triton.layers import call_parameters, is_uncalled, require_exact_gradient, why_no_rule


@dataclass(frozen=True)
class LayerParams:
    """A layer and the parameters that it owns directly.

    Attributes:
        name: the module's name in the model.
        layer: the module itself.
        parameters: by their names within the module.
        group: the index of the optimizer's parameter group that all of them are in.
        why_sgd: why they take the plain SGD step, or None if they have rows.
    """

    name: str
    layer: nn.Module
    parameters: Mapping[str, nn.Parameter]
    group: int
    why_sgd: str | None

    def trained(self) -> list[str]:
        """Return the names of the parameters that require gradients at present."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    def label(self, parameter: str) -> str:
        """Return the name in the model of ``parameter``, a name within the layer."""
        return full_name(self.name, parameter)


def full_name(layer: str, parameter: str) -> str:
    """Return a parameter's name in the model from the name of its layer and its name within the layer."""
    return f"{layer}.{parameter}" if layer else parameter


BlocksChoice = Literal["layer", "network"] | Sequence[Sequence[str]]
"""Which layers form a block (M11): each its own, all one, or those of each list, where a name includes submodules."""


def fisher_blocks_of(choice: BlocksChoice, layers: Sequence[LayerParams], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the layers that form each block, by the name of the block.

    Args:
        choice: which layers form a block; a layer in no list is a block of its own.
        layers: all layers of the model.
        names: the layers with rows; the others are left out.

    Raises:
        ValueError: a list names a module without parameters, or a layer is in several lists.
    """
    if choice == "layer":
        return {name: [name] for name in names}
    if choice == "network":
        return {"network": list(names)} if names else {}
    known = [layer.name for layer in layers]
    lists = [[name for entry in group for name in known if _is_inside(name, entry)] for group in choice]
    unknown = [entry for group in choice for entry in group if not any(_is_inside(name, entry) for name in known)]
    if unknown:
        raise ValueError(
            f"blocks names {', '.join(map(repr, unknown))}, where no block is; there are {', '.join(map(repr, known))}"
        )
    twice = [name for name, count in Counter(name for group in lists for name in group).items() if count > 1]
    if twice:
        raise ValueError(f"blocks names {', '.join(map(repr, twice))} more than once: put each into one list only")
    present = [[name for name in group if name in names] for group in lists]
    listed = {name for group in lists for name in group}
    alone = {name: [name] for name in names if name not in listed}
    return {" + ".join(entries): group for entries, group in zip(choice, present, strict=True) if group} | alone


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose calls are recorded, because they give rows.

    Attributes:
        layer: the module.
        parameters: the parameters that its calls use, by their names within it. Of two modules that share a parameter,
            both have it here, although it belongs to one of them.
        rerun: whether no rule describes the layer, so that its rows come from running it again.
    """

    layer: nn.Module
    parameters: Mapping[str, Tensor]
    rerun: bool


def find_captured_layers(model: nn.Module, layers: Sequence[LayerParams]) -> dict[str, CapturedLayer]:
    """Return the layers whose calls use parameters that have rows, their own or those of another layer, by name."""
    covered = {p for layer in layers if layer.why_sgd is None for p in layer.parameters.values()}
    modules, captured = dict(model.named_modules()), {}
    for name, module in modules.items():
        used = {} if is_uncalled(name, modules) else call_parameters(module)
        parameters = {label: p for label, p in used.items() if p in covered}
        if parameters:
            captured[name] = CapturedLayer(module, parameters, why_no_rule(module) is not None)
    return captured


def find_layer_params(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], explicit: bool = False
) -> list[LayerParams]:
    """Return every layer that owns parameters of ``groups``, and one more for each group's other parameters.

    A parametrized layer owns the parameters of its parametrizations.

    Args:
        model: the model itself, not compiled.
        groups: the optimizer's parameter groups.
        explicit: whether parameters that no rule describes have rows; otherwise they take the plain SGD step.

    Raises:
        ValueError: a module's parameters are in different groups, or an option of a module makes its gradient differ
            from the derivative of the loss.
    """
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    modules = dict(model.named_modules())
    why_uncovered = {} if explicit else _uncovered(modules)
    layers = []
    for name, module in modules.items():
        own = {label: p for label, p in _owned(name, module, modules).items() if p in group_of}
        if not own:
            continue
        require_exact_gradient(name, module)
        indices = {group_of.pop(p) for p in set(own.values())}
        if len(indices) > 1:
            raise ValueError(
                f"{', '.join(own)} of {name or type(module).__name__!r} are in different parameter groups; they form "
                "one block of the Fisher matrix: put them into one group"
            )
        why = next((why_uncovered[p] for p in own.values() if p in why_uncovered), None)
        layers.append(LayerParams(name, module, own, indices.pop(), why))
    return layers + _params_of_no_module(model, group_of)


def _params_of_no_module(model: nn.Module, group_of: Mapping[nn.Parameter, int]) -> list[LayerParams]:
    """Return an entry for each group's parameters that are none of the model's."""
    layers = []
    for index in set(group_of.values()):
        parameters = [p for p, group in group_of.items() if group == index]
        labels = {str(k): parameter for k, parameter in enumerate(parameters)}
        layers.append(LayerParams(f"group {index}", model, labels, index, "not a parameter of the model"))
    return layers


def _owned(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that a module owns directly, each under one name only."""
    if is_uncalled(name, modules):
        parametrization = name.rpartition(".")[0].endswith("parametrizations")
        return {} if parametrization else dict(module.named_parameters(recurse=False))
    owned = {label: p for label, p in call_parameters(module).items() if not label.startswith("out_proj.")}
    labels = {p: label for label, p in reversed(owned.items())}
    return {label: p for label, p in owned.items() if labels[p] == label}


def _uncovered(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Return why no rule covers a parameter, for each parameter that some layer without a rule uses."""
    why: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        reason = None if is_uncalled(name, modules) else why_no_rule(module)
        if reason is not None:
            why |= {p: reason for p in call_parameters(module).values() if p not in why}
    return why
