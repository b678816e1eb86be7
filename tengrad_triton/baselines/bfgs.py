"""Inverse Hessians from pairs (s, y): BFGS, its limited-memory form, and double damping (docs/math.md, M15).

A pair holds a change s of the variables and the change y of the gradient that it caused.

Dimensions: G groups, O entries of s and y, M pairs, I columns of the matrix that H is multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override


class Inverse(Protocol):
    """A positive definite approximation H of an inverse Hessian, one for each group."""

    def apply(self, v_GOI: Tensor) -> Tensor:
        """Return H V: [G, O, I]."""

    def updated(self, s_GO: Tensor, y_GO: Tensor) -> Inverse:
        """Return the BFGS update of H, for which H y = s; a group in which sᵀ y is not positive keeps its H."""


@dataclass(frozen=True)
class DenseInverse(Inverse):
    """H as a matrix.

    Attributes:
        h_GOO: H.
    """

    h_GOO: Tensor

    @classmethod
    def identity(cls, like_GO: Tensor) -> DenseInverse:
        """Return H = I for vectors of this shape, dtype and device."""
        eye_OO = torch.eye(like_GO.shape[1], dtype=like_GO.dtype, device=like_GO.device)
        return cls(eye_OO.repeat(len(like_GO), 1, 1))

    @override
    def apply(self, v_GOI: Tensor) -> Tensor:
        return self.h_GOO @ v_GOI

    @override
    def updated(self, s_GO: Tensor, y_GO: Tensor) -> DenseInverse:
        """Return (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ with ρ = 1 / sᵀ y; a group without sᵀ y > 0 keeps its H."""
        is_positive_G, sy_G = _inner_products(s_GO, y_GO)
        hy_GO = (self.h_GOO @ y_GO[..., None])[..., 0]
        # The added terms are written as X + Xᵀ, so that H stays exactly symmetric.
        u_GO = ((1 + (y_GO * hy_GO).sum(1) / sy_G) / 2 / sy_G)[:, None] * s_GO - hy_GO / sy_G[:, None]
        half_GOO = s_GO[:, :, None] * u_GO[:, None, :]
        h_GOO = torch.where(is_positive_G[:, None, None], self.h_GOO + half_GOO + half_GOO.mT, self.h_GOO)
        return DenseInverse(h_GOO)


@dataclass(frozen=True)
class LimitedMemoryInverse(Inverse):
    """H of the last M pairs, starting from I: H = Qᵀ Q + Tᵀ D T with Q = I − Y T.

    Both terms are squares, so they are positive semidefinite in any precision. Source: theorem 2.2 of Byrd, Nocedal and
    Schnabel 1994, rearranged into these squares.

    Attributes:
        s_GMO: s of the pairs, the oldest first; 0 for pairs that do not exist yet, and for pairs without sᵀ y > 0.
        y_GMO: y of the pairs, likewise.
        t_GMO: T = R⁻¹ Sᵀ, where R is the upper triangle of Sᵀ Y with its diagonal.
        d_GM: the diagonal of D: sᵀ y of each pair, or 1 if its s and y are 0.
    """

    s_GMO: Tensor
    y_GMO: Tensor
    t_GMO: Tensor
    d_GM: Tensor

    @classmethod
    def identity(cls, like_GO: Tensor, pairs: int) -> LimitedMemoryInverse:
        """Return H = I for vectors of this shape, dtype and device, with room for M = ``pairs``."""
        s, y, t = (like_GO.new_zeros(len(like_GO), pairs, like_GO.shape[1]) for _ in range(3))
        return cls(s, y, t, torch.ones_like(s[..., 0]))

    @override
    def apply(self, v_GOI: Tensor) -> Tensor:
        t_GMI = self.t_GMO @ v_GOI
        q_GOI = torch.baddbmm(v_GOI, self.y_GMO.mT, t_GMI, alpha=-1)
        return torch.baddbmm(q_GOI, self.t_GMO.mT, self.d_GM[..., None] * t_GMI - self.y_GMO @ q_GOI)

    @override
    def updated(self, s_GO: Tensor, y_GO: Tensor) -> LimitedMemoryInverse:
        is_positive_G, sy_G = _inner_products(s_GO, y_GO)
        s_GMO, y_GMO = (
            torch.cat([kept[:, 1:], torch.where(is_positive_G[:, None], new, 0.0)[:, None]], 1)
            for kept, new in ((self.s_GMO, s_GO), (self.y_GMO, y_GO))
        )
        d_GM = torch.cat([self.d_GM[:, 1:], sy_G[:, None]], 1)
        # Double precision, because nearly parallel pairs make the triangle ill-conditioned.
        r_GMM = torch.triu((s_GMO @ y_GMO.mT).double(), 1) + torch.diag_embed(d_GM.double())
        t_GMO = torch.linalg.solve_triangular(r_GMM, s_GMO.double(), upper=True).to(s_GMO.dtype).contiguous()
        return LimitedMemoryInverse(s_GMO, y_GMO, t_GMO, d_GM)


def _inner_products(s_GO: Tensor, y_GO: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which groups sᵀ y > 0, and sᵀ y itself, replaced by 1 in the other groups."""
    sy_G = (s_GO * y_GO).sum(1)
    is_positive_G = (sy_G > 0) & sy_G.isfinite()
    return is_positive_G, torch.where(is_positive_G, sy_G, 1.0)


def double_damping(inverse: Inverse, s_GO: Tensor, y_GO: Tensor, mu_1: float, mu_2: float) -> tuple[Tensor, Tensor]:
    """Return a pair close to (s, y) that keeps H and its inverse bounded, as vectors [G, O].

    Powell's damping on H moves s towards H y until sᵀ y ≥ μ₁ yᵀ H y. Then damping with B = I moves y towards s until
    sᵀ y ≥ μ₂ sᵀ s. Source: Goldfarb, Ren and Bahamou 2020, algorithm 3.

    Args:
        inverse: H, which the pair will update.
        s_GO: the change of the variables.
        y_GO: the change of the gradient.
        mu_1: μ₁ in (0, 1).
        mu_2: μ₂ in (0, 1].
    """
    hy_GO = inverse.apply(y_GO[..., None])[..., 0]
    yhy_G, sy_G = (y_GO * hy_GO).sum(1), (s_GO * y_GO).sum(1)
    s_GO = torch.lerp(hy_GO, s_GO, _theta(sy_G, mu_1, yhy_G)[:, None])
    ss_G, sy_G = s_GO.square().sum(1), (s_GO * y_GO).sum(1)
    y_GO = torch.lerp(s_GO, y_GO, _theta(sy_G, mu_2, ss_G)[:, None])
    return s_GO, y_GO


def _theta(sy_G: Tensor, mu: float, full_G: Tensor) -> Tensor:
    """Return the largest θ ≤ 1 for which θ sᵀy + (1 − θ) full ≥ μ full."""
    is_short_G = sy_G < mu * full_G
    gap_G = torch.where(is_short_G, full_G - sy_G, 1.0)
    return torch.where(is_short_G, (1 - mu) * full_G / gap_G, 1.0)
