"""Calling a module with other tensors in place of its own, where it may be at two places of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

Places = Mapping[str, Sequence[str]]
"""For each name of a parameter or buffer in a module, the names under which it is replaced."""


def places_of(module: nn.Module) -> Places:
    """Return one name for each module that holds a tensor.

    `functional_call` would replace the tensors of a module at two places twice, and put back the replacement.
    """
    names: dict[int, list[str]] = {}
    for prefix, part in module.named_modules():  # each module once
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    everything = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name: names[id(tensor)] for name, tensor in everything}


def call_with(
    module: nn.Module, places: Places, tensors: Mapping[str, Tensor], args: Any, kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Return what the module returns with other tensors, by any of their names; ``places`` are `places_of` it."""
    everywhere = {place: tensor for name, tensor in tensors.items() for place in places[name]}
    return functional_call(module, everywhere, args, None if kwargs is None else dict(kwargs), tie_weights=False)
