"""The three products with J, for many parameters at once: one kernel launch for all Jacobians that can share it.

Apart from M7 and M12, refreshes and steps compute nothing else with J: gram (K = J Jᵀ), project (J V) and expand
(Jᵀ w, with the update).

Dimensions: L Fisher blocks, N rows of J, R directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import Ops, Product, ProductKernels, Representation, implementation_names
from tengrad_triton.curvature.target import Target


class Jacobian(Protocol):
    """Rows J_n of one parameter, N of them.

    A class whose products share launches with other parameters is `Grouped` as well.
    """

    @property
    def rows(self) -> int:
        """Return N, the number of stored rows: fewer than the refresh's after M7 or M12."""

    @property
    def ops(self) -> Ops:
        """Return the kernels that compute the products (see `choices.ops_for`)."""

    @property
    def product_kernels(self) -> ProductKernels:
        """Return the kernels' names, by product."""

    def gram(self) -> Tensor:
        """Return k_NN with K[n, m] = ⟨J_n, J_m⟩."""

    def project(self, v: Tensor) -> Tensor:
        """Return y_N with y_n = ⟨J_n, v⟩ for a tensor ``v`` of the parameter's shape."""

    def expand_update_(self, target: Target, w_N: Tensor, damping: Tensor) -> None:
        """Step the target's parameter in place along (grad − Σ_n w_n J_n) / damping, by the rule of `kernels.update_`.

        Entries of ``w_N`` beyond N are not read.
        """

    def combine(self, directions_RN: Tensor) -> Jacobian:
        """Return R linear combinations of the rows, as explicit rows."""

    def append_history(self, older: Jacobian, rows: int) -> Jacobian | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``; None where the two do not fit."""

    @property
    def representation(self) -> Representation:
        """Return the name of this representation."""

    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which `checkpoint.unpack` makes the same object."""

    @property
    def nbytes(self) -> int:
        """Return the bytes stored."""


LayerJacobian = Mapping[str, Jacobian]
"""The J of every parameter of a layer, by the parameter's name within it."""
Jacobians = Mapping[str, LayerJacobian]
"""The J of every layer, by the layer's name."""


def _implementations(ops: Ops, kernels: Sequence[str]) -> Hashable:
    """Return the implementations that ``ops`` has for these kernels, where they are not the default ones.

    Jacobians can share a launch only if these are equal. Overrides of other kernels make no difference.
    """
    if not ops.kernel_overrides:  # the usual case, and this is called several times for every weight in every step
        return ()
    names = implementation_names(ops.kernel_overrides)
    return tuple(names[kernel] for kernel in kernels if kernel in names)


class Grouped(ABC):
    """A `Jacobian` that shares kernel launches with others of the same `group_key`.

    `PerSample` calls the ops `gram_rows`, `project_rows` and `expand_rows_update_`. `Factored` calls `gram`, or
    `gram_rows` of rows that it forms, `project` and `expand_update_`, or the last two for convolutions (`jacobian.py`).

    The ``*_grouped`` functions take one list entry for each Jacobian. Where the result has ``count`` blocks, Jacobian t
    adds to index ``blocks[t]``.
    """

    ops: Ops

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return N."""

    @property
    @abstractmethod
    def product_kernels(self) -> ProductKernels:
        """Return the kernels that each product consists of."""

    @abstractmethod
    def _layout(self) -> Hashable:
        """Return what has to be equal for Jacobians to share a launch, apart from sizes: types and dtypes."""

    def group_key(self, product: Product) -> Hashable:
        """Return the key of a product's launch: Jacobians with equal keys share it."""
        return self._layout(), _implementations(self.ops, self.product_kernels[product])

    @staticmethod
    @abstractmethod
    def gram_grouped(jacobians: Sequence[Any], blocks: list[int], count: int) -> Tensor:
        """Return k_LNN, the sum of `Jacobian.gram` over the Jacobians of each of ``count`` blocks."""

    @staticmethod
    @abstractmethod
    def project_grouped(jacobians: Sequence[Any], v: Sequence[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, the sum of `Jacobian.project` over the Jacobians of each block."""

    @staticmethod
    @abstractmethod
    def expand_update_grouped_(
        jacobians: Sequence[Any], targets: Sequence[Target], w: Sequence[Tensor], dampings: Sequence[Tensor]
    ) -> None:
        """Apply each Jacobian's `Jacobian.expand_update_`; all targets agree on ``nesterov``."""

    def gram(self) -> Tensor:
        """Return k_NN (see `Jacobian.gram`)."""
        return self.gram_grouped([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:
        """Return y_N (see `Jacobian.project`)."""
        return self.project_grouped([self], [v], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, w_N: Tensor, damping: Tensor) -> None:
        """Step one target (see `Jacobian.expand_update_`)."""
        self.expand_update_grouped_([self], [target], [w_N], [damping])


class BlockEntry(NamedTuple):
    """One parameter of a Fisher block: its J, the index of its block, and the target of its update."""

    jacobian: Jacobian
    block: int
    target: Target


def grams(jacobians: Sequence[Jacobian], blocks: Sequence[int], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix of every block: the sum of its parameters', which lie side by side in J."""
    k_LNN: Tensor | None = None
    for group in _groups("gram", jacobians):
        own, of_block = [jacobians[t] for t in group], [blocks[t] for t in group]
        first = own[0]
        if isinstance(first, Grouped):
            part = first.gram_grouped(own, of_block, count)
        else:
            part = _placed(first.gram(), of_block[0], count)
        k_LNN = part if k_LNN is None else k_LNN + part
    assert k_LNN is not None
    return k_LNN


def projections(entries: Sequence[BlockEntry], count: int, rows: int) -> Tensor:
    """Return y_LN = J V, summed over the parameters of every block; zeros follow where a block has fewer rows."""
    y_LN: Tensor | None = None
    for group in _groups("project", [one.jacobian for one in entries]):
        own, first = [entries[t] for t in group], entries[group[0]]
        if isinstance(first.jacobian, Grouped):
            grads, blocks = [one.target.grad for one in own], [one.block for one in own]
            part = first.jacobian.project_grouped([one.jacobian for one in own], grads, blocks, [count, rows])
        else:
            y_N = first.jacobian.project(first.target.grad)
            part = _placed(torch.nn.functional.pad(y_N, (0, rows - len(y_N))), first.block, count)
        y_LN = part if y_LN is None else y_LN + part
    assert y_LN is not None
    return y_LN


def expand_updates_(entries: Sequence[BlockEntry], w: Sequence[Tensor], dampings: Sequence[Tensor]) -> None:
    """Step every target along (grad − Jᵀ w) / damping; ``w`` and ``dampings`` have an entry for every block."""
    for group in _groups("expand", [one.jacobian for one in entries], [one.target.nesterov for one in entries]):
        own, first = [entries[t] for t in group], entries[group[0]]
        own_w, own_dampings = [w[one.block] for one in own], [dampings[one.block] for one in own]
        if isinstance(first.jacobian, Grouped):
            targets = [one.target for one in own]
            first.jacobian.expand_update_grouped_([one.jacobian for one in own], targets, own_w, own_dampings)
        else:
            first.jacobian.expand_update_(first.target, own_w[0], own_dampings[0])


def _placed(one: Tensor, block: int, count: int) -> Tensor:
    whole = one.new_zeros(count, *one.shape)
    whole[block] = one
    return whole


def _groups(
    product: Product, jacobians: Sequence[Jacobian], also_equal: Sequence[Hashable] | None = None
) -> Iterator[list[int]]:
    """Yield the indices of Jacobians that share a launch: equal keys, and equal entries of ``also_equal``."""
    groups: dict[Hashable, list[int]] = {}
    for index, one in enumerate(jacobians):
        if isinstance(one, Grouped):
            key: Hashable = (one.group_key(product), also_equal[index] if also_equal else None)
        else:
            key = index
        groups.setdefault(key, []).append(index)
    yield from groups.values()
