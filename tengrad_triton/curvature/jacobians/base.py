"""The class of all Jacobians: the rows J_n of one parameter, and the three products with them.

Dimensions: L Fisher blocks, N rows of J, R directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from tengrad_triton.curvature.choices import Ops, Product, ProductKernels, Representation, implementation_names
from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels import ProductLaunches

Operands = tuple[Any, ...]
"""Arguments of an op that stand for J: its lists of rows or of factors."""


class UpdateState(NamedTuple):
    """What an update of several parameters reads and writes beside J: lists with one tensor for each of them.

    Attributes:
        params: updated in place.
        momenta: updated in place.
        grads: the gradients of what is minimized.
        w: the coefficients of the rows of each J.
        dampings: one of each.
        settings: [lr, momentum, weight_decay, shrink] of each.
        nesterov: whether the steps look ahead along the momenta.
    """

    params: list[Tensor]
    momenta: list[Tensor]
    grads: list[Tensor]
    w: list[Tensor]
    dampings: list[Tensor]
    settings: list[Tensor]
    nesterov: bool

    def arguments(self, operands: Operands, *others: Any) -> tuple[Any, ...]:
        """Return the arguments of an op that updates, followed by others."""
        return (*self[:3], *operands, *self[3:], *others)


class Jacobian(ABC):
    """Rows J_n of one parameter, N of them.

    Jacobians of the same `group_key` share kernel launches. `PerSample` calls the ops `gram_rows`, `project_rows` and
    `expand_rows_update_`. `Factored` calls `gram`, or `gram_rows` of rows that it forms, `project` and
    `expand_update_`, or the last two for convolutions (`jacobian.py`). An `EmbeddingJacobian` shares none.

    The ``*_grouped`` functions take one list entry for each Jacobian. Where the result has ``count`` blocks, Jacobian t
    adds to index ``blocks[t]``.

    With scaled damping F + α D the rows are those of J D⁻¹. Then `project` is J D⁻¹ V, and `expand` is D⁻¹ Jᵀ w (M17).

    Attributes:
        ops: the kernels that compute the products (see `choices.ops_for`).
        scale: D of the parameter; None for the identity.
    """

    ops: Ops
    scale: Scale | None

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return N, the number of stored rows: fewer than the refresh's after M7 or M12."""

    @property
    @abstractmethod
    def product_kernels(self) -> ProductKernels:
        """Return the kernels that each product consists of."""

    @property
    @abstractmethod
    def representation(self) -> Representation:
        """Return the name of this representation."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes stored."""

    @abstractmethod
    def explicit_rows(self) -> Tensor:
        """Return the rows j_NK, in float32 at least, with the K entries in the order of `layers.matrix_view`."""

    @abstractmethod
    def combine(self, directions_RN: Tensor) -> Jacobian:
        """Return R linear combinations of the rows, as explicit rows."""

    @abstractmethod
    def _times(self, by: Multiplier) -> Jacobian:
        """Return L J_n M in place of the rows J_n."""

    def in_scale(self, scale: Scale | None) -> Jacobian | None:
        """Return the rows of J D⁻¹ with another D than that of now; None if only one of the two is the identity."""
        if self.scale is None or scale is None:
            return self if self.scale is scale else None
        rescaled: Any = self._times(self.scale.over(scale))
        return cast("Jacobian", replace(rescaled, scale=scale))

    def for_gram(self) -> Jacobian:
        """Return rows whose Gram matrix is J D⁻¹ Jᵀ: those of J D^-½, up to a rotation of each."""
        return self if self.scale is None else self._times(self.scale.root())

    def without_what_makes_k(self) -> Jacobian:
        """Return the same rows without what only K is formed from."""
        return self

    def append_history(self, older: Jacobian, rows: int) -> Jacobian | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``; None where the two do not fit."""
        fitting = older.in_scale(self.scale)
        return None if fitting is None else self._append(fitting, rows)

    @abstractmethod
    def _append(self, older: Jacobian, rows: int) -> Jacobian | None:
        """Do what `append_history` does with rows of the same D."""

    @abstractmethod
    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which, and from D, `checkpoint.unpack` makes the same object."""

    def _packed(self) -> dict[str, Any]:
        """Return what all representations pack."""
        return {"kernel_overrides": list(self.ops.kernel_overrides)}

    @abstractmethod
    def _layout(self) -> Hashable:
        """Return what has to be equal for Jacobians to share a launch, apart from sizes: types, dtypes, device."""

    def group_key(self, product: Product) -> Hashable:
        """Return the key of a product's launch: Jacobians with equal keys share it."""
        names = implementation_names(self.ops.kernel_overrides)
        own = tuple(names[kernel] for kernel in self.product_kernels[product] if kernel in names)
        return self._layout(), own

    @abstractmethod
    def view(self, x: Tensor) -> Tensor:
        """Return a view of a parameter-shaped tensor in the shape that `project_grouped` and the update take."""

    @staticmethod
    @abstractmethod
    def gram_grouped(jacobians: Sequence[Any], blocks: list[int], count: int) -> Tensor:
        """Return k_LNN, the sum of `gram` over the Jacobians of each of ``count`` blocks."""

    @staticmethod
    @abstractmethod
    def operands_of(jacobians: Sequence[Any]) -> Operands:
        """Return what the two functions below take of the Jacobians: lists, as the ops take them."""

    @abstractmethod
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        """Return y_LN of this shape, the sum of `project` over the Jacobians of each block; ``v`` are views.

        Any of the Jacobians can do it for all.
        """

    @abstractmethod
    def expand_update_grouped_(self, operands: Operands, state: UpdateState) -> None:
        """Apply each Jacobian's `expand_update_`; the parameters, momenta and gradients of ``state`` are views.

        Any of the Jacobians can do it for all. Each w has as many entries as its J has rows.
        """

    def launches(self, operands: Operands, state: UpdateState, blocks: list[int]) -> ProductLaunches | None:
        """Return the launches of both products along the gradients of ``state``; None if an op has to be called."""
        return None

    def gram(self) -> Tensor:
        """Return k_NN with the inner products of the rows."""
        return self.gram_grouped([self], [0], 1)[0]

    def project(self, v: Tensor) -> Tensor:
        """Return y_N with y_n = ⟨J_n, v⟩ for a tensor ``v`` of the parameter's shape."""
        return self.project_grouped(self.operands_of([self]), [self.view(v)], [0], [1, self.rows])[0]

    def expand_update_(self, target: Target, grad: Tensor, w_N: Tensor, damping: Tensor) -> None:
        """Step the target's parameter in place along (grad − Σ_n w_n J_n) / damping, by the rule of `kernels.update_`.

        Entries of ``w_N`` beyond N are not read.
        """
        params, momenta, grads = ([self.view(x)] for x in (target.parameter, target.momentum, grad))
        numbers = ([w_N[: self.rows]], [damping], [target.settings])
        state = UpdateState(params, momenta, grads, *numbers, target.nesterov)
        self.expand_update_grouped_(self.operands_of([self]), state)


LayerJacobian = Mapping[str, Jacobian]
"""The J of every parameter of a layer, by the parameter's name within it."""
Jacobians = Mapping[str, LayerJacobian]
"""The J of every layer, by the layer's name."""
