"""Tensors that keep their addresses, so that a captured CUDA graph is replayed without copying its inputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")


def mark_static(tensors: Any) -> None:
    """Tell `torch.compile` that nested tensors keep their addresses, so that CUDA graphs need not copy them."""
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor)


class StaticBuffers:
    """Buffers for nested tensors, which each refresh replaces by others, mostly of the same shapes."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._key: Any = None

    def update(self, nested: T) -> T:
        """Copy the values into the buffers and return the buffers. If a shape or a number differs, make new buffers."""
        leaves, structure = tree_flatten(nested)
        key = structure, [_signature(leaf) for leaf in leaves]
        if key != self._key:
            self._leaves = []  # frees the old buffers before the new ones are allocated
            self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._key = key
            mark_static(self._leaves)
        else:
            for buffer, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(leaf, Tensor) and leaf is not buffer:
                    buffer.copy_(leaf)
        return tree_unflatten(self._leaves, structure)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
