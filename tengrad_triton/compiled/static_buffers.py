"""Tensors that mark_static where they are, so that a captured graph is replayed without copying its inputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

T = TypeVar("T")


def mark_static(tensors: Any) -> None:
    """Promise `torch.compile` that these tensors are written in place only: CUDA graphs read them where they are."""
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor)


class StaticBuffers:
    """A place for nested tensors that are replaced now and then by others of the same shapes."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._key: Any = None

    def take(self, nested: T) -> T:
        """Return the same values, in the tensors that are here; in new ones where a shape or anything else differs."""
        leaves, structure = tree_flatten(nested)
        key = structure, [_signature(leaf) for leaf in leaves]
        if key != self._key:
            self._leaves = []  # their memory goes first
            self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._key = key
            mark_static(self._leaves)
        else:
            for mine, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(leaf, Tensor) and leaf is not mine:
                    mine.copy_(leaf)
        return tree_unflatten(self._leaves, structure)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
