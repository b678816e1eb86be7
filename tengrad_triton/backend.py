"""Which kernels do the work: the ops, or their definitions in PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

from tengrad_triton import kernels

Backend = Literal["auto", "torch"]


def kernels_of(backend: Backend) -> Any:
    """Return the namespace of the ops (which choose by the tensors' device), or that of the definitions alone."""
    if backend == "auto":
        return kernels
    return SimpleNamespace(**{spec.name: spec.reference for spec in kernels.SPECS})
