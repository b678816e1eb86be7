"""The blocks of the Fisher matrix: what one module owns directly, and who is left to plain SGD.

A shared parameter belongs to the first module that owns it.
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
    """The parameters that one module owns, in one group.

    Attributes:
        name: the module's name in the model.
        layer: the module itself.
        parameters: by their names within the module.
        group: the index of their parameter group.
        why_sgd: why no rule covers them, or None where one does.
    """

    name: str
    layer: nn.Module
    parameters: Mapping[str, nn.Parameter]
    group: int
    why_sgd: str | None

    def trained(self) -> list[str]:
        """Return the names of those parameters that are not frozen at present."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    def label(self, parameter: str) -> str:
        """Return the parameter's full name."""
        return full_name(self.name, parameter)


def full_name(block: str, parameter: str) -> str:
    """Return a parameter's name in the model, from its block's name and its own within it."""
    return f"{block}.{parameter}" if block else parameter


BlocksChoice = Literal["layer", "network"] | Sequence[Sequence[str]]
"""How layers form systems (M11): each its own, all together, or as listed; a module's name stands for all within it."""


def fisher_blocks_of(choice: BlocksChoice, blocks: Sequence[LayerParams], names: Sequence[str]) -> dict[str, list[str]]:
    """Return which of the blocks named are solved together, by the name of the first; those not listed by themselves.

    Raises:
        ValueError: a list names a block twice, or nothing.
    """
    if choice == "layer":
        return {name: [name] for name in names}
    if choice == "network":
        return {"network": list(names)} if names else {}
    known = [block.name for block in blocks]
    lists = [[name for entry in group for name in known if _within(name, entry)] for group in choice]
    unknown = [entry for group in choice for entry in group if not any(_within(name, entry) for name in known)]
    if unknown:
        raise ValueError(
            f"blocks names {', '.join(map(repr, unknown))}, where no block is; there are {', '.join(map(repr, known))}"
        )
    twice = [name for name, count in Counter(name for group in lists for name in group).items() if count > 1]
    if twice:
        raise ValueError(f"blocks names {', '.join(map(repr, twice))} more than once: each can be in one list only")
    present = [[name for name in group if name in names] for group in lists]
    listed = {name for group in lists for name in group}
    alone = {name: [name] for name in names if name not in listed}
    return {" + ".join(entries): group for entries, group in zip(choice, present, strict=True) if group} | alone


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose calls make rows.

    Attributes:
        layer: the module.
        parameters: those that its calls use, by their names within it: its own, and those of modules that it does not
            call. Some may belong to the block of another module that shares them.
        rerun: whether no rule describes it, and rows come from running it again.
    """

    layer: nn.Module
    parameters: Mapping[str, Tensor]
    rerun: bool


def find_captured_layers(model: nn.Module, blocks: Sequence[LayerParams]) -> dict[str, CapturedLayer]:
    """Return the layers whose calls use parameters of covered blocks, by name."""
    covered = {p for block in blocks if block.why_sgd is None for p in block.parameters.values()}
    modules, sources = dict(model.named_modules()), {}
    for name, module in modules.items():
        own = {} if is_uncalled(name, modules) else call_parameters(module)
        parameters = {label: p for label, p in own.items() if p in covered}
        if parameters:
            sources[name] = CapturedLayer(module, parameters, why_no_rule(module) is not None)
    return sources


def find_layer_params(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], explicit: bool = False
) -> list[LayerParams]:
    """Return a block for every module that owns parameters of ``groups``, and one for those of no module.

    A parametrized layer owns its parametrizations' parameters. ``explicit`` covers what no rule describes.

    Raises:
        ValueError: a module's parameters are in different groups, or an option of it makes gradients no derivatives.
    """
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    modules = dict(model.named_modules())
    why_uncovered = {} if explicit else _uncovered(modules)
    blocks = []
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
        blocks.append(LayerParams(name, module, own, indices.pop(), why))
    strangers = {index: [p for p, i in group_of.items() if i == index] for index in set(group_of.values())}
    for index, parameters in strangers.items():
        labels = {str(k): parameter for k, parameter in enumerate(parameters)}
        blocks.append(LayerParams(f"group {index}", model, labels, index, "not a parameter of the model"))
    return blocks


def _owned(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return what a module owns directly, each parameter once."""
    if is_uncalled(name, modules):
        parametrization = name.rpartition(".")[0].endswith("parametrizations")
        return {} if parametrization else dict(module.named_parameters(recurse=False))
    accounted = {label: p for label, p in call_parameters(module).items() if not label.startswith("out_proj.")}
    labels = {p: label for label, p in reversed(accounted.items())}
    return {label: p for label, p in accounted.items() if labels[p] == label}


def _uncovered(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Return why no rule covers a parameter, for each that some layer without one uses."""
    why: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        reason = None if is_uncalled(name, modules) else why_no_rule(module)
        if reason is not None:
            why |= {p: reason for p in call_parameters(module).values() if p not in why}
    return why
