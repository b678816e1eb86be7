"""Running a module again without its user noticing: no hooks of the user, no attribute left behind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KEPT_BY_TORCH = ("_parameters", "_buffers", "_modules")  # `functional_call` puts these back itself


@contextmanager
def unobserved(module: nn.Module) -> Iterator[None]:
    """Within the context, call no hooks but torch's own; afterwards, give all attributes the values they had.

    Torch's own hooks compute weights (weight norm, spectral norm, pruning). Lists, dictionaries and sets among the
    attributes get back their entries; what lies deeper does not.
    """
    if torch.compiler.is_compiling():  # the hooks of a traced model are part of its graph
        yield
        return
    before = [(part, _attributes(part)) for part in module.modules()]
    for part, _ in before:
        for name in _HOOKS:
            hooks = getattr(part, name)
            kept = ((key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch."))
            object.__setattr__(part, name, OrderedDict(kept))
    try:
        yield
    finally:
        for part, attributes in before:
            _restore(part, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return each attribute of a module with a copy of its entries, where it is a container."""
    return {
        name: (value, value.copy() if type(value) in (list, dict, set) else None)
        for name, value in vars(module).items()
        if name not in _KEPT_BY_TORCH
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    present = vars(module)
    for name in present.keys() - attributes.keys() - set(_KEPT_BY_TORCH):
        del present[name]
    for name, (value, entries) in attributes.items():
        present[name] = value
        if entries is not None:
            value.clear()
            value.extend(entries) if isinstance(value, list) else value.update(entries)
