"""Which kernels do the work: the ops, or their definitions in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from tengrad_triton import kernels

Backend = Literal["auto", "torch"]
KernelsFor = Callable[[tuple[str, ...]], Any]
"""The kernels to use, given the names of those that PyTorch does better, or another launch configuration."""


def kernels_of(backend: Backend, torch_for: Collection[str] = ()) -> Any:
    """Return a namespace of the ops by name, which choose between Triton and PyTorch by the tensors' device.

    Those named in ``torch_for``, and all of them with ``backend="torch"``, are the definitions in PyTorch instead. A
    name with a launch configuration behind it (``"project_rows:tall"``) is the op with that one.
    """
    names = {spec.name: spec for spec in kernels.SPECS}
    tiles = {f"{spec.name}:{tile}": (spec.name, tile) for spec in kernels.SPECS for tile in spec.config_names}
    if unknown := set(torch_for) - names.keys() - tiles.keys():
        raise ValueError(
            f"no kernels named {', '.join(sorted(unknown))}; there are {', '.join(sorted({*names, *tiles}))}"
        )
    ops: dict[str, Any] = {name: getattr(kernels, name) for name in names}
    ops |= {name: partial(ops[name], config=tile) for name, tile in (tiles[one] for one in torch_for if one in tiles)}
    ops |= {name: spec.torch_impl for name, spec in names.items() if backend == "torch" or name in torch_for}
    return SimpleNamespace(torch_for=tuple(sorted(torch_for)), **ops)
