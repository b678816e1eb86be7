"""Which kernels do the work: the ops, or their definitions in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

from tengrad_triton import kernels

Backend = Literal["auto", "torch"]
KernelsFor = Callable[[tuple[str, ...]], Any]
"""The kernels to use, given the names of those that PyTorch does better."""


def kernels_of(backend: Backend, torch_for: Iterable[str] = ()) -> Any:
    """Return a namespace of the ops by name, which choose between Triton and PyTorch by the tensors' device.

    Those named in ``torch_for``, and all of them with ``backend="torch"``, are the definitions in PyTorch instead.
    """
    names = {spec.name for spec in kernels.SPECS}
    if unknown := set(torch_for) - names:
        raise ValueError(f"no kernels named {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    chosen = names if backend == "torch" else set(torch_for)
    ops = {spec.name: spec.reference if spec.name in chosen else getattr(kernels, spec.name) for spec in kernels.SPECS}
    return SimpleNamespace(torch_for=tuple(sorted(torch_for)), **ops)
