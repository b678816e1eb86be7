"""ENGD: energy natural gradient descent with the whole Gramian, or one for each layer.

Müller and Zeinhofer, 2023 (arXiv 2302.13163), with the damping, the average over steps and the start of Dangel, Müller
and Zeinhofer, 2024 (arXiv 2405.15603): G ← β G + (1 − β) Jᵀ J, and the direction is −(G + λ I)⁺ Jᵀ r. The
pseudo-inverse drops singular values below ε P times the largest one, as LAPACK's gelsd does for them.

Key: P parameters, Q parameters of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from studies.pinn.rivals.descent import Rival
from studies.pinn.rivals.squares import LeastSquares

LARGEST = 20_000
"The most parameters of one Gramian: its eigenvectors take another 3.2 GB."


class Engd(Rival):
    """ENGD.

    Args:
        squares: the problem and its network.
        damping: λ.
        average: β, the weight of the Gramians of earlier steps.
        identity: whether G starts as the identity instead of zero.
        per_layer: whether G is block-diagonal, a block for each layer.
        lr: a fixed step size, or None for the grid search.

    Raises:
        ValueError: if a Gramian has more than ``LARGEST`` parameters.
    """

    def __init__(
        self,
        squares: LeastSquares,
        damping: float,
        average: float = 0.0,
        identity: bool = False,
        per_layer: bool = False,
        lr: float | None = None,
    ) -> None:
        super().__init__(squares, lr)
        self.damping, self.average = damping, average
        sizes = [p.numel() for p in squares.parameters]
        if per_layer:
            sizes = [weight + bias for weight, bias in zip(sizes[0::2], sizes[1::2], strict=True)]
        self.blocks = sizes if per_layer else [sum(sizes)]
        if max(self.blocks) > LARGEST:
            raise ValueError(f"ENGD: a Gramian of {max(self.blocks)} parameters is too large, of more than {LARGEST}")
        like = squares.parameters[0]
        self.gramians = [like.new_zeros(size, size).detach() for size in self.blocks]
        if identity:
            for gramian_QQ in self.gramians:
                gramian_QQ.fill_diagonal_(1.0)

    @override
    @torch.no_grad()
    def direction(self, points: Mapping[str, Any]) -> tuple[Tensor, float]:
        rows = self.squares.rows(points)
        jacobian_NP = rows.matrix()
        gradient_P = jacobian_NP.T @ rows.residual_N
        parts = []
        blocks = zip(self.gramians, jacobian_NP.split(self.blocks, 1), gradient_P.split(self.blocks), strict=True)
        for gramian_QQ, jacobian_NQ, gradient_Q in blocks:
            torch.addmm(
                gramian_QQ, jacobian_NQ.T, jacobian_NQ, beta=self.average, alpha=1 - self.average, out=gramian_QQ
            )
            parts.append(-solve_symmetric(gramian_QQ, self.damping, gradient_Q))
        return torch.cat(parts), rows.residual_N.square().sum().item()


def solve_symmetric(gramian_QQ: Tensor, damping: float, gradient_Q: Tensor) -> Tensor:
    """Return (G + λ I)⁺ g, ``[Q]``, for a symmetric G: its singular values are the sizes of its eigenvalues."""
    damped_QQ = gramian_QQ.clone()
    damped_QQ.diagonal().add_(damping)
    values_Q, vectors_QQ = torch.linalg.eigh(damped_QQ)
    sizes_Q = values_Q.abs()
    kept_Q = sizes_Q > torch.finfo(sizes_Q.dtype).eps * len(sizes_Q) * sizes_Q.max()
    inverse_Q = torch.where(kept_Q, 1 / values_Q, 0.0)
    return vectors_QQ @ (inverse_Q * (vectors_QQ.T @ gradient_Q))
