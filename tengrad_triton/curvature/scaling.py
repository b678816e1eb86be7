"""The matrix D of scaled damping F + α D: in every group of a weight a Kronecker product (docs/math.md, M17).

Dimensions: G groups, O outputs and I inputs of a group, T taps of a convolution's kernel (1 for other layers); C
channels of a group and S pixels of an image; N samples, P positions, K entries of a flat gradient; D entries of an
embedded vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.sides import Side, sides_of
from tengrad_triton.layers import (
    Contribution,
    ConvInput,
    EmbeddingGrads,
    OuterProducts,
    PerSampleGrads,
    flatten_rows,
)


class Multiplier(NamedTuple):
    """Matrices L and M of each group, with which the group's part X_t [O, I] of a weight becomes L X_t M at each tap t.

    Attributes:
        left: L as [G, O, O], or as a diagonal [G, O].
        right: M as [G, I, I], or as a diagonal [G, I].
    """

    left: Tensor
    right: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether L and M are given as diagonals."""
        return self.left.dim() == self.right.dim() == 2

    def of_groups(self, x: Tensor) -> Tensor:
        """Return L X M for X [G, O, T, I]."""
        is_matrix = self.left.dim() == 3
        x = (self.left @ x.flatten(2)).view(x.shape) if is_matrix else x * self.left[:, :, None, None]
        if self.right.dim() == 2:
            return x * self.right[:, None, None, :]
        return (x.flatten(1, 2) @ self.right).view(x.shape)

    def as_parameter(self, like: Tensor) -> Tensor:
        """Return diagonal L and M as numbers to multiply the entries of a parameter, in its memory layout."""
        if like.dim() > 2 or len(self.left) > 1 or not like.is_contiguous():
            return self.of_parameter(torch.ones_like(like))
        return self.flat(like.numel()).view(like.shape)

    def of_parameter(self, x: Tensor) -> Tensor:
        """Return L X M for a parameter-shaped tensor, in its memory layout and in the type of L and M."""
        x = x.to(self.left.dtype)
        if x.dim() == 2 and len(self.left) == 1:
            left = self.left[0]
            return _times(left @ x if left.dim() == 2 else x * left.unsqueeze(1), self.right[0])
        outputs, inputs = self.left.shape[1], self.right.shape[1]
        made = self.of_groups(x.reshape(len(self.left), outputs, inputs, -1).mT)
        return torch.empty_like(x).copy_(made.mT.reshape(x.shape))

    def of_parameters(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return L X M for several contiguous tensors of one shape, each with as many of the groups."""
        outputs, inputs = self.left.shape[1], self.right.shape[1]
        x = torch.stack(tuple(tensors)).to(self.left.dtype)
        made = self.of_groups(x.view(len(self.left), outputs, inputs, -1).mT)
        return made.mT.reshape(x.shape).unbind()

    def of_rows(self, j_NK: Tensor) -> Tensor:
        """Return the rows of J with L J_n M in place of J_n, in the type of L and M.

        The columns are in the order of `matrix_view`.
        """
        j_NK = j_NK.to(self.left.dtype)
        if self.is_diagonal:
            return j_NK * self.flat(j_NK.shape[1])
        return self._times_rows(j_NK, True, True)

    def flat(self, entries: int) -> Tensor:
        """Return diagonal L and M as numbers [K] to multiply the entries of a row."""
        if len(self.left) == 1 and entries == self.left.numel() * self.right.numel():
            return (self.left.mT * self.right).view(entries)
        both_GOTI = self.left[:, :, None, None] * self.right[:, None, None, :]
        return both_GOTI.expand(-1, -1, entries // both_GOTI.numel(), -1).reshape(entries)

    def explicit_rows(self, outer: OuterProducts, ops: Ops) -> Tensor:
        """Return the rows L J_n M. Each side multiplies its factor, or the rows where these have fewer entries."""
        x = outer.a.x_NCHW if isinstance(outer.a, ConvInput) else outer.a
        entries = outer.samples * outer.entries
        first_left, first_right = outer.g_NGPO.numel() <= entries, x.numel() <= entries
        g_NGPO = self.of_outputs(outer.g_NGPO) if first_left else outer.g_NGPO
        factors = OuterProducts(self.of_inputs(outer.a) if first_right else outer.a, g_NGPO)
        j_NK = factors.widened().sample_grads(ops)
        if not first_left and not first_right:
            return self.of_rows(j_NK)
        return self._times_rows(j_NK, not first_left, not first_right)

    def prefers_factors(self, outer: OuterProducts) -> bool:
        """Whether it takes fewer flops to make the rows L J_n M of the factors than of the rows J_n."""
        x = outer.a.x_NCHW if isinstance(outer.a, ConvInput) else outer.a
        left, right = (m.shape[1] if m.dim() == 3 else 0 for m in self)
        rows, positions = outer.samples * outer.entries, outer.g_NGPO.shape[2]
        return rows * positions + outer.g_NGPO.numel() * left + x.numel() * right < rows * (left + right)

    def _times_rows(self, j_NK: Tensor, left: bool, right: bool) -> Tensor:
        """Return the rows of J with L J_n M, L J_n or J_n M in place of J_n.

        Matrices come first: a diagonal then multiplies their result in place.
        """
        n, (groups, outputs), inputs = len(j_NK), self.left.shape[:2], self.right.shape[1]
        x = made = j_NK.view(n, groups, outputs, -1, inputs)
        if left and self.left.dim() == 3:  # a batch of products, each with the same L: no copies of X
            batch = self.left.expand(n, *self.left.shape).flatten(0, 1)
            made = torch.bmm(batch, made.reshape(n * groups, outputs, -1)).view(x.shape)
        if right and self.right.dim() == 3:
            one = made.reshape(-1, inputs) @ self.right[0] if groups == 1 else None
            made = (torch.einsum("ngoti,gij->ngotj", made, self.right) if one is None else one).reshape(x.shape)
        for multiplies, diagonal in ((left, self.left[:, :, None, None]), (right, self.right[:, None, None, :])):
            if multiplies and diagonal.dim() == 4:
                made = made * diagonal if made is x else made.mul_(diagonal)
        return made.reshape(j_NK.shape)

    def of_embedding(self, embedding: EmbeddingGrads) -> EmbeddingGrads:
        """Return the embedding gradients of L J_n M; L is diagonal, with an entry for each vector of the table."""
        g_NPD = embedding.g_NPD.to(self.left.dtype) * self.left[0, embedding.ids_NP].unsqueeze(2)
        return replace(embedding, g_NPD=_times(g_NPD, self.right[0]))

    def of_outer_products(self, outer: OuterProducts) -> OuterProducts:
        """Return the factors of L J_n M: a becomes Mᵀ a, and g becomes L g."""
        return OuterProducts(self.of_inputs(outer.a), self.of_outputs(outer.g_NGPO))

    def of_outputs(self, g_NGPO: Tensor) -> Tensor:
        """Return L g."""
        return _times_groups(g_NGPO, self.left.mT if self.left.dim() == 3 else self.left)

    def of_inputs(self, a: Tensor | ConvInput) -> Tensor | ConvInput:
        """Return Mᵀ a."""
        if isinstance(a, ConvInput):
            x_NGCS = a.x_NCHW.to(self.right.dtype).flatten(2).unflatten(1, (len(self.right), -1))
            moved = self.right.mT @ x_NGCS if self.right.dim() == 3 else x_NGCS * self.right.unsqueeze(2)
            return replace(a, x_NCHW=moved.reshape(a.x_NCHW.shape))
        a_NGPTI = a.unflatten(3, (-1, self.right.shape[1]))
        return _times_groups(a_NGPTI.flatten(2, 3), self.right).reshape(a.shape)


def _times(x: Tensor, right: Tensor) -> Tensor:
    """Return x M for M as a matrix, or as a diagonal."""
    return x @ right if right.dim() == 2 else x * right


def _times_groups(x_NGPI: Tensor, right: Tensor) -> Tensor:
    """Return x M in every group, by one product for all samples, in the type of M."""
    x_NGPI = x_NGPI.to(right.dtype)
    if right.dim() == 2:
        return x_NGPI * right.unsqueeze(1)
    moved = x_NGPI.transpose(0, 1).flatten(1, 2) @ right
    return moved.unflatten(1, (len(x_NGPI), -1)).transpose(0, 1)


@dataclass(frozen=True)
class Scale:
    """D of one parameter: X ↦ R X_t C in every group, where R and C are symmetric and positive definite.

    Attributes:
        rows: R of each group.
        columns: C of each group; ones where the parameter is a vector.
    """

    rows: Side
    columns: Side

    def itself(self) -> Multiplier:
        """Return D."""
        return Multiplier(self.rows.matrices(), self.columns.matrices())

    @property
    def inverse(self) -> Multiplier:
        """D⁻¹."""
        return Multiplier(self.rows.inverse, self.columns.inverse)

    def root(self, of_inverse: bool = False) -> Multiplier:
        """Return what makes rows of the Gram matrix J D Jᵀ of the rows J, or of J D⁻¹ Jᵀ."""
        left = self.rows.root(of_inverse)
        return Multiplier(left.mT if left.dim() == 3 else left, self.columns.root(of_inverse))

    def over(self, new: Scale) -> Multiplier:
        """Return what makes the rows J D_new⁻¹ of J D⁻¹."""
        left = _product(new.rows.inverse, self.rows.matrices())
        return Multiplier(left, _product(self.columns.matrices(), new.columns.inverse))

    @property
    def nbytes(self) -> int:
        """Return the bytes stored."""
        return sum(x.nbytes for x in self.pack() if x is not None)

    def __str__(self) -> str:
        sides = (
            f"{side.values_Gn.shape[1]}{'' if side.basis_Gnn is None else '²'}" for side in (self.rows, self.columns)
        )
        return " ⊗ ".join(sides)

    def pack(self) -> list[Tensor | None]:
        """Return the tensors from which `unpack_scales` makes an equal object."""
        return [*self.rows[:2], *self.columns[:2]]


def unpack_scales(packed: Sequence[Sequence[Tensor | None]]) -> list[Scale]:
    """Return the objects whose `pack` returned these tensors."""
    spectra = [(one[at], one[at + 1]) for at in (0, 2) for one in packed]
    sides = sides_of([(values_Gn, basis_Gnn) for values_Gn, basis_Gnn in spectra if values_Gn is not None])
    return [Scale(*both) for both in zip(sides[: len(packed)], sides[len(packed) :], strict=True)]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return the products of matrices of each group, some of which are given as diagonals."""
    if x.dim() == 2:
        return x * y if y.dim() == 2 else x.unsqueeze(2) * y
    return x * y.unsqueeze(1) if y.dim() == 2 else x @ y


def explicit_rows(call: Contribution, ops: Ops, by: Multiplier | None) -> Tensor:
    """Return the explicit rows [N, K] of one call, L J_n M in place of J_n."""
    if isinstance(call, PerSampleGrads):
        j_NK = flatten_rows(call.j_NK)
        return j_NK if by is None else by.of_rows(j_NK)
    if by is None:
        return call.sample_grads(ops)
    if isinstance(call, EmbeddingGrads):
        return by.of_embedding(call).sample_grads(ops)
    return by.explicit_rows(call, ops)


def clip_scale(square: Tensor, threshold: float) -> Tensor:
    """Return min(1, threshold / root) of mean squares."""
    return (threshold * square.clamp(min=torch.finfo(square.dtype).tiny).rsqrt()).clamp(max=1.0)


def unit_of(parameter: Tensor) -> float:
    """Return the root of a weight's inputs, taps included, over 8; 1 for vectors. A part of its outputs gives the same.

    A layer of n inputs has weights of about n^-½. In these units its steps are as large as those of other layers.
    """
    return math.sqrt(parameter.shape[1:].numel() / 64) if parameter.dim() > 1 else 1.0


Scales = Mapping[str, Mapping[str, Scale]]
"""D of every parameter with rows, by its layer's name and its own name within that; empty if D is the identity."""
