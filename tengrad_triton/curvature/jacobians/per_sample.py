"""J entry by entry: the explicit rows of one parameter.

Dimensions: N rows, K entries of a flat gradient, R directions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import PER_SAMPLE_KERNELS, Ops, ProductKernels, Representation, step_configs
from tengrad_triton.curvature.jacobians.base import Jacobian, Jacobians, Operands, UpdateState
from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.kernels import ProductLaunches, rows_products
from tengrad_triton.kernels.cholesky import LARGEST_BATCHED
from tengrad_triton.kernels.cpu import worth_a_batch
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import OuterProducts, matrix_view

CHUNK_BYTES = 256 * 2**20  # explicit rows formed at a time where they are not kept

RowKind = Literal["samples", "directions", "parameters"]
"""What a row of explicit J is: one sample's gradient, a direction (M7), or a row of R in J = Q R (M12)."""


@dataclass(frozen=True)
class PerSample(Jacobian):
    """J itself, entry by entry: every product is one pass over memory.

    In bfloat16 every product uses the rounded rows: the step is exact for a slightly different Fisher matrix.
    Compression (M7) and reduction (M12) replace the rows of the samples by fewer ones (see `RowKind`).

    Attributes:
        j_NK: the rows.
        ops: the kernels.
        row_kind: what a row is.
        scale: D of the parameter; None for the identity.
        factors: those of J without D⁻¹ until K is formed, where that takes fewer flops from them than from ``j_NK``.
        for_k: rows with the Gram matrix K until that is formed, where it does not follow from ``j_NK``.
    """

    j_NK: Tensor
    ops: Ops
    row_kind: RowKind
    scale: Scale | None = None
    factors: OuterProducts | None = None
    for_k: Jacobian | None = None

    @property
    @override
    def rows(self) -> int:
        return len(self.j_NK)

    @property
    @override
    def product_kernels(self) -> ProductKernels:
        return PER_SAMPLE_KERNELS

    @override
    def _layout(self) -> Hashable:
        return PerSample, self.j_NK.dtype, self.j_NK.device

    @override
    def view(self, x: Tensor) -> Tensor:
        return matrix_view(x)

    @staticmethod
    @override
    def gram_grouped(jacobians: Sequence[PerSample], blocks: list[int], count: int) -> Tensor:
        return jacobians[0].ops.gram_rows([one.j_NK for one in jacobians], blocks, count)

    @staticmethod
    @override
    def operands_of(jacobians: Sequence[PerSample]) -> Operands:
        return ([one.j_NK for one in jacobians],)

    @override
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        return self.ops.project_rows(*operands, v, blocks, shape)

    @override
    def expand_update_grouped_(self, operands: Operands, state: UpdateState) -> None:
        self.ops.expand_rows_update_(*state.arguments(operands))

    @override
    def launches(self, operands: Operands, state: UpdateState, blocks: list[int]) -> ProductLaunches | None:
        configs = step_configs(self.ops, PER_SAMPLE_KERNELS)
        return None if configs is None else rows_products(*state.arguments(operands, blocks, configs))

    @override
    def explicit_rows(self) -> Tensor:
        return widen(self.j_NK)

    @override
    def combine(self, directions_RN: Tensor) -> PerSample:
        """Return R linear combinations of the rows."""
        return PerSample(directions_RN @ self.j_NK, self.ops, "directions", self.scale)

    @override
    def _times(self, by: Multiplier) -> PerSample:
        return replace(self, j_NK=by.of_rows(self.j_NK).to(self.j_NK.dtype), factors=None)

    @override
    def for_gram(self) -> Jacobian:
        """Return rows of the Gram matrix, in float32 at least: from those that are stored, or from their factors."""
        if self.for_k is not None:
            return self.for_k
        if self.scale is None:
            return self
        if self.factors is not None:
            return replace(self, j_NK=self.scale.root(of_inverse=True).explicit_rows(self.factors, self.ops))
        j_NK = widen(self.j_NK)
        return replace(self, j_NK=self.scale.root().of_rows(j_NK).to(j_NK.dtype))

    @override
    def without_what_makes_k(self) -> PerSample:
        """Return the same rows alone."""
        return self if self.factors is None and self.for_k is None else replace(self, factors=None, for_k=None)

    @override
    def _append(self, older: Jacobian, rows: int) -> PerSample | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``, if that has the same dtype."""
        if not isinstance(older, PerSample) or older.j_NK.dtype != self.j_NK.dtype:
            return None
        return replace(self, j_NK=torch.cat([self.j_NK, older.j_NK[:rows]]), factors=None)

    @property
    @override
    def representation(self) -> Representation:
        """Return the name of this representation."""
        if self.row_kind == "directions":
            return "compressed"
        return "per_sample_bf16" if self.j_NK.dtype == torch.bfloat16 else "per_sample"

    @override
    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers."""
        return {**self._packed(), "j_NK": self.j_NK, "row_kind": self.row_kind}

    @property
    @override
    def nbytes(self) -> int:
        """Return the bytes stored."""
        return self.j_NK.nbytes


def store_contiguously(jacobians: Jacobians) -> Jacobians:
    """Return the same J, with small explicit rows of one size stored as parts of one tensor.

    A CPU can then multiply them in one batched call.
    """
    by_size: dict[Hashable, list[Tensor]] = {}
    for one in (one for layer in jacobians.values() for one in layer.values()):
        if isinstance(one, PerSample):
            by_size.setdefault((one.j_NK.shape, one.j_NK.dtype), []).append(one.j_NK)
    moved: dict[int, Tensor] = {}
    for alike in filter(worth_a_batch, by_size.values()):
        moved |= zip(map(id, alike), torch.stack(alike).unbind(), strict=True)
    if not moved:
        return jacobians

    def placed(one: Jacobian) -> Jacobian:
        return replace(one, j_NK=moved.get(id(one.j_NK), one.j_NK)) if isinstance(one, PerSample) else one

    return {name: {param_name: placed(one) for param_name, one in layer.items()} for name, layer in jacobians.items()}


def reduce_rows(jacobians: Jacobians, names: Sequence[str]) -> Jacobians:
    """Return the J of a block, replaced by R of J = Q R where the block has fewer parameters than rows.

    Rᵀ R = Jᵀ J, so F is the same, and K has as many rows as there are parameters (M12). J that is not explicit stays as
    it is. So does J of few rows on a GPU: there all blocks with that many rows share their launches, which take no
    longer for more blocks, while each decomposition would take launches of its own, and each size of K too.
    """
    chosen = {(name, param_name): one for name in names for param_name, one in jacobians[name].items()}
    explicit = [one for one in chosen.values() if isinstance(one, PerSample) and one.j_NK.dtype != torch.bfloat16]
    entries = [one.j_NK.shape[1] for one in explicit]
    if len(explicit) < len(chosen) or sum(entries) >= len(explicit[0].j_NK) or _share_launches(explicit[0].j_NK):
        return {name: jacobians[name] for name in names}
    r_KK = torch.linalg.qr(torch.cat([one.j_NK for one in explicit], 1), mode="r").R
    parts = dict(zip(chosen, r_KK.split(entries, dim=1), strict=True))
    return {
        name: {
            param_name: replace(
                cast("PerSample", one),
                j_NK=parts[name, param_name].contiguous(),
                row_kind="parameters",
                factors=None,
            )
            for param_name, one in jacobians[name].items()
        }
        for name in names
    }


def _share_launches(j_NK: Tensor) -> bool:
    """Return whether kernels factor blocks of this size, many in one launch."""
    return not j_NK.is_cpu and len(j_NK) <= LARGEST_BATCHED
