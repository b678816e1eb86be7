"""The J of a parameter of which this process has no outputs, because others have them all: rows without entries."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import PER_SAMPLE_KERNELS, Ops, ProductKernels, Representation
from tengrad_triton.curvature.jacobians.base import Jacobian, Operands, UpdateState
from tengrad_triton.curvature.scaling import Multiplier, Scale


@dataclass(frozen=True)
class NoEntries(Jacobian):
    """N rows without entries: both products are zero, and there is nothing to update.

    Attributes:
        count: N.
        like: a tensor of the type and on the device of K.
        ops: not used.
        scale: D of the parameter.
    """

    count: int
    like: Tensor
    ops: Ops
    scale: Scale | None = None

    @property
    @override
    def rows(self) -> int:
        return self.count

    @property
    @override
    def product_kernels(self) -> ProductKernels:
        return PER_SAMPLE_KERNELS

    @property
    @override
    def representation(self) -> Representation:
        """Return the name that explicit rows have."""
        return "per_sample"

    @property
    @override
    def nbytes(self) -> int:
        """Return 0."""
        return 0

    @override
    def explicit_rows(self) -> Tensor:
        return self.like.new_zeros(self.count, 0)

    @override
    def combine(self, directions_RN: Tensor) -> NoEntries:
        """Return R rows."""
        return replace(self, count=len(directions_RN))

    @override
    def _times(self, by: Multiplier) -> NoEntries:
        return self

    @override
    def for_gram(self) -> NoEntries:
        """Return the rows themselves."""
        return self

    @override
    def _append(self, older: Jacobian, rows: int) -> NoEntries:
        return replace(self, count=self.count + rows)

    @override
    def pack(self) -> dict[str, Any]:
        raise ValueError("a part of J cannot be packed: other processes have the rest")

    @override
    def _layout(self) -> Hashable:
        return NoEntries

    @override
    def view(self, x: Tensor) -> Tensor:
        return x

    @staticmethod
    @override
    def gram_grouped(jacobians: Sequence[NoEntries], blocks: list[int], count: int) -> Tensor:
        return jacobians[0].like.new_zeros(count, jacobians[0].count, jacobians[0].count)

    @staticmethod
    @override
    def operands_of(jacobians: Sequence[NoEntries]) -> Operands:
        return ()

    @override
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        return self.like.new_zeros(shape)

    @override
    def expand_update_grouped_(self, operands: Operands, state: UpdateState) -> None:
        """Do nothing."""
