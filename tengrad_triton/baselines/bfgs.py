"""Inverse Hessians from pairs (s, y): the BFGS formula, its limited-memory form, and damping that keeps them positive.

Dimensions: G groups, O entries of s and y, M pairs kept, I columns that the inverse is applied to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Inverse(Protocol):
    """A positive definite approximation H of an inverse Hessian, one a group."""

    def apply(self, v_GOI: Tensor) -> Tensor:
        """Return H V."""

    def updated(self, s_GO: Tensor, y_GO: Tensor) -> Inverse:
        """Return the BFGS update of H, for which H y = s; the same where sᵀ y is not positive."""


@dataclass(frozen=True)
class Dense:
    """H itself."""

    h_GOO: Tensor

    def apply(self, v_GOI: Tensor) -> Tensor:  # noqa: D102
        return self.h_GOO @ v_GOI

    def updated(self, s_GO: Tensor, y_GO: Tensor) -> Dense:
        """Return (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ with ρ = 1 / sᵀ y."""
        curved_G, product_G = _curved(s_GO, y_GO)
        hy_GO = (self.h_GOO @ y_GO[..., None])[..., 0]
        # Twice this, made symmetric by its transpose, is what is added; equal bits on both sides of the diagonal.
        u_GO = ((1 + (y_GO * hy_GO).sum(1) / product_G) / 2 / product_G)[:, None] * s_GO - hy_GO / product_G[:, None]
        half_GOO = s_GO[:, :, None] * u_GO[:, None, :]
        return Dense(torch.where(curved_G[:, None, None], self.h_GOO + half_GOO + half_GOO.mT, self.h_GOO))


@dataclass(frozen=True)
class Memory:
    """H of the last M pairs on top of I: H = Qᵀ Q + Tᵀ D T with Q = I − Y T.

    That is theorem 2.2 of Byrd, Nocedal and Schnabel 1994, its terms gathered into squares: both are positive
    semidefinite as they stand, in any precision.

    Attributes:
        s_GMO: the pairs' s, the oldest first; 0 where there is no pair yet, or one that has no curvature.
        y_GMO: their y, 0 there too.
        t_GMO: T = R⁻¹ Sᵀ, with R the upper triangle of Sᵀ Y, diagonal included.
        d_GM: the diagonal of D: each pair's sᵀ y, 1 where there is none.
    """

    s_GMO: Tensor
    y_GMO: Tensor
    t_GMO: Tensor
    d_GM: Tensor

    @classmethod
    def empty(cls, like_GO: Tensor, most: int) -> Memory:
        """Return H = I for vectors like these, with places for so many pairs."""
        s, y, t = (like_GO.new_zeros(len(like_GO), most, like_GO.shape[1]) for _ in range(3))
        return cls(s, y, t, torch.ones_like(s[..., 0]))

    def apply(self, v_GOI: Tensor) -> Tensor:  # noqa: D102
        t_GMI = self.t_GMO @ v_GOI
        u_GOI = torch.baddbmm(v_GOI, self.y_GMO.mT, t_GMI, alpha=-1)
        return torch.baddbmm(u_GOI, self.t_GMO.mT, self.d_GM[..., None] * t_GMI - self.y_GMO @ u_GOI)

    def updated(self, s_GO: Tensor, y_GO: Tensor) -> Memory:  # noqa: D102
        curved_G, product_G = _curved(s_GO, y_GO)
        s_GMO, y_GMO = (
            torch.cat([kept[:, 1:], torch.where(curved_G[:, None], new, 0.0)[:, None]], 1)
            for kept, new in ((self.s_GMO, s_GO), (self.y_GMO, y_GO))
        )
        d_GM = torch.cat([self.d_GM[:, 1:], product_G[:, None]], 1)
        # A triangle of many nearly parallel pairs wants more digits than a step does.
        upper_GMM = torch.triu((s_GMO @ y_GMO.mT).double(), 1) + torch.diag_embed(d_GM.double())
        t_GMO = torch.linalg.solve_triangular(upper_GMM, s_GMO.double(), upper=True).to(s_GMO.dtype).contiguous()
        return Memory(s_GMO, y_GMO, t_GMO, d_GM)


def _curved(s_GO: Tensor, y_GO: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs have sᵀ y > 0, and sᵀ y, 1 for the others."""
    product_G = (s_GO * y_GO).sum(1)
    curved_G = (product_G > 0) & product_G.isfinite()
    return curved_G, torch.where(curved_G, product_G, 1.0)


def doubly_damped(
    inverse: Inverse, s_GO: Tensor, y_GO: Tensor, shrink: float, least: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the pair, changed as little as needed for H and its inverse to mark_static bounded (K-BFGS, algorithm 3).

    First Powell's damping on H: s moves towards H y until sᵀ y ≥ ``shrink`` yᵀ H y. Then on the inverse with B = I: y
    moves towards s until sᵀ y ≥ ``least`` sᵀ s, with ``least`` at most 1.
    """
    hy_GO = inverse.apply(y_GO[..., None])[..., 0]
    yhy_G, sy_G = (y_GO * hy_GO).sum(1), (s_GO * y_GO).sum(1)
    s_GO = torch.lerp(hy_GO, s_GO, _share(sy_G, shrink, yhy_G)[:, None])
    ss_G, sy_G = s_GO.square().sum(1), (s_GO * y_GO).sum(1)
    y_GO = torch.lerp(s_GO, y_GO, _share(sy_G, least, ss_G)[:, None])
    return s_GO, y_GO


def _share(product_G: Tensor, fraction: float, bound_G: Tensor) -> Tensor:
    """Return θ ≤ 1 with θ product + (1 − θ) bound ≥ fraction · bound."""
    short_G = product_G < fraction * bound_G
    gap_G = torch.where(short_G, bound_G - product_G, 1.0)
    return torch.where(short_G, (1 - fraction) * bound_G / gap_G, 1.0)
