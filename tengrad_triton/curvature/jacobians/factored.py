"""The factors of one parameter's J, from which both products of a step are computed without J itself.

Dimensions: N rows, G groups, P positions, I inputs and O outputs of a group, R directions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import (
    CONV_KERNELS,
    FACTORED_KERNELS,
    Ops,
    ProductKernels,
    Representation,
    step_configs,
)
from tengrad_triton.curvature.concat import concat_outer, take_outer_rows
from tengrad_triton.curvature.geometry import geometry_of
from tengrad_triton.curvature.jacobians.base import Jacobian, Operands, UpdateState
from tengrad_triton.curvature.jacobians.per_sample import CHUNK_BYTES, PerSample
from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.kernels import ProductLaunches, conv_products, factors_products
from tengrad_triton.layers import ConvInput, OuterProducts, matrix_view


@dataclass(frozen=True)
class Factored(Jacobian):
    """The factors a (inputs) and g (output gradients) with J_n = Σ_p g_np a_npᵀ. J_n is not stored.

    ``for_k`` has rows with the Gram matrix K until that is formed, where it does not follow from the factors.
    """

    factors: OuterProducts
    ops: Ops
    scale: Scale | None = None
    for_k: Jacobian | None = None

    @property
    @override
    def rows(self) -> int:
        return len(self.factors.g_NGPO)

    @override
    def for_gram(self) -> Jacobian:
        """Return rows of the Gram matrix."""
        return super().for_gram() if self.for_k is None else self.for_k

    @override
    def without_what_makes_k(self) -> Factored:
        """Return the factors alone."""
        return self if self.for_k is None else replace(self, for_k=None)

    def prefers_sample_space(self, samples: int) -> bool:
        """Whether J is dense, and it takes fewer flops to project V from that many factors than V itself (M19).

        Dense are inputs and output gradients of one matrix each: one group, and one position for each row.
        """
        a, g_NGPO = self.factors.a, self.factors.g_NGPO
        if not isinstance(a, Tensor) or g_NGPO.shape[1:3] != (1, 1):
            return False
        inputs, outputs = a.shape[3], g_NGPO.shape[3]
        return samples * (inputs + outputs) < inputs * outputs

    @property
    @override
    def product_kernels(self) -> ProductKernels:
        return CONV_KERNELS if isinstance(self.factors.a, ConvInput) else FACTORED_KERNELS

    @override
    def _layout(self) -> Hashable:
        return type(self.factors.a), self.factors.g_NGPO.dtype, self.factors.g_NGPO.device

    @override
    def view(self, x: Tensor) -> Tensor:
        a = self.factors.a
        return x.view(*x.shape[:2], *a.kernel_size) if isinstance(a, ConvInput) else matrix_view(x)

    @staticmethod
    @override
    def gram_grouped(jacobians: Sequence[Factored], blocks: list[int], count: int) -> Tensor:
        """Return k_LNN; each Gram matrix comes from pairs of positions or from explicit rows, whichever is cheaper."""
        ops, parts = jacobians[0].ops, []
        entries = list(zip(jacobians, blocks, strict=True))
        by_rows = [geometry_of(one.factors).prefers_explicit_rows for one in jacobians]
        from_pairs = [entry for entry, explicit in zip(entries, by_rows, strict=True) if not explicit]
        if from_pairs:
            a, g = [one._a_NGPI() for one, _ in from_pairs], [one.factors.g_NGPO for one, _ in from_pairs]
            parts.append(ops.gram(a, g, [block for _, block in from_pairs], count))
        for one, block in (entry for entry, explicit in zip(entries, by_rows, strict=True) if explicit):
            parts += [ops.gram_rows([few.sample_grads(ops)], [block], count) for few in one._output_parts()]
        return sum(parts[1:], start=parts[0])

    @staticmethod
    @override
    def operands_of(jacobians: Sequence[Factored]) -> Operands:
        """Return (a, g); of convolutions, inputs, output gradients [N, O, H, W], and all `ConvGeometry.numbers`."""
        convs = [one.factors.a for one in jacobians if isinstance(one.factors.a, ConvInput)]
        if not convs:
            return [one.factors.a for one in jacobians], [one.factors.g_NGPO for one in jacobians]
        g = [one.factors.g_NOHW(a) for one, a in zip(jacobians, convs, strict=True)]
        return [a.x_NCHW for a in convs], g, [number for a in convs for number in a.geometry.numbers]

    @override
    def project_grouped(self, operands: Operands, v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
        if isinstance(self.factors.a, ConvInput):
            x, g, geometries = operands
            return self.ops.project_conv(x, g, v, geometries, blocks, shape)
        return self.ops.project(*operands, v, blocks, shape)

    def project_without(self, of_grad: OuterProducts) -> Tensor:
        """Return y_N, the projection of V = Σ_m g_m a_mᵀ, from its factors: it takes no V (M19); J is dense.

        y_n = Σ_m ⟨a_n, a_m⟩ ⟨g_n, g_m⟩: products of N × M numbers in place of passes over the weight.
        """
        own = self.factors.widened()
        pairs = (cast("Tensor", own.a), cast("Tensor", of_grad.a)), (own.g_NGPO, of_grad.g_NGPO)
        aa_NM, gg_NM = (x.flatten(0, 2) @ y.flatten(0, 2).to(x.dtype).mT for x, y in pairs)
        return (aa_NM * gg_NM).sum(1)

    @override
    def expand_update_grouped_(self, operands: Operands, state: UpdateState) -> None:
        is_conv = isinstance(self.factors.a, ConvInput)
        expand_update_ = self.ops.expand_conv_update_ if is_conv else self.ops.expand_update_
        expand_update_(*state.arguments(operands))

    @override
    def launches(self, operands: Operands, state: UpdateState, blocks: list[int]) -> ProductLaunches | None:
        products = conv_products if isinstance(self.factors.a, ConvInput) else factors_products
        configs = step_configs(self.ops, self.product_kernels)
        return None if configs is None else products(*state.arguments(operands, blocks, configs))

    @override
    def explicit_rows(self) -> Tensor:
        return self.factors.widened().sample_grads(self.ops)

    @override
    def combine(self, directions_RN: Tensor) -> PerSample:
        """Return R linear combinations of the rows; explicit rows are formed for some outputs at a time."""
        groups, inputs, count = self.factors.g_NGPO.shape[1], geometry_of(self.factors).inputs, len(directions_RN)
        parts = [
            (directions_RN @ part.sample_grads(self.ops)).view(count, groups, part.outputs, inputs)
            for part in self._output_parts()
        ]
        return PerSample(torch.cat(parts, 2).flatten(1), self.ops, "directions", self.scale)

    def _a_NGPI(self) -> Tensor:
        a = self.factors.a
        return a.unfold() if isinstance(a, ConvInput) else a

    def _output_parts(self) -> list[OuterProducts]:
        """Return the factors of some outputs at a time, whose explicit rows take at most `CHUNK_BYTES`."""
        chunks = -(-geometry_of(self.factors).per_sample_bytes // CHUNK_BYTES)
        return [OuterProducts(self.factors.a, g) for g in self.factors.g_NGPO.chunk(chunks, dim=3)]

    @override
    def _times(self, by: Multiplier) -> Factored:
        return replace(self, factors=by.of_outer_products(self.factors))

    @override
    def _append(self, older: Jacobian, rows: int) -> Factored | None:
        """Return these rows, followed by the first ``rows`` rows of ``older``, if that has the same sizes."""
        own = self.factors
        if not isinstance(older, Factored) or older.factors.g_NGPO.shape[1:] != own.g_NGPO.shape[1:]:
            return None
        first = torch.arange(rows, device=own.g_NGPO.device)
        return replace(self, factors=concat_outer([[own], [take_outer_rows(older.factors, first)]]))

    @property
    @override
    def representation(self) -> Representation:
        """Return the name of this representation."""
        return "factored"

    @override
    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers."""
        a = self.factors.a
        packed_a = a.pack() if isinstance(a, ConvInput) else a
        return {**self._packed(), "a": packed_a, "g_NGPO": self.factors.g_NGPO}

    @property
    @override
    def nbytes(self) -> int:
        """Return the bytes stored."""
        a = self.factors.a
        return (a.x_NCHW if isinstance(a, ConvInput) else a).nbytes + self.factors.g_NGPO.nbytes
