"""ENGD-W and SPRING: the damped Gauss-Newton step in the space of the rows.

Guzmán-Cordero, Dangel, Goldshlager and Zeinhofer, 2025 (arXiv 2505.12149). ENGD-W goes along −Jᵀ (J Jᵀ + λ I)⁻¹ r,
which is −(Jᵀ J + λ I)⁻¹ Jᵀ r. SPRING (Goldshlager, Abrahamsen and Lin, 2024, arXiv 2401.10190) keeps
φ_k = μ φ_{k−1} + Jᵀ (J Jᵀ + λ I)⁻¹ (−r − μ J φ_{k−1}) and goes along φ_k / √(1 − μ^{2k}), k = 1, 2, …

Key: N rows, P parameters, K columns of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from studies.pinn.rivals.descent import Rival
from studies.pinn.rivals.rows import Rows
from studies.pinn.rivals.squares import LeastSquares

SHIFT = 1e-7
"ν of the Nyström approximation, as its authors' code has it."


class Woodbury(Rival):
    """ENGD-W, and SPRING where ``momentum`` is above zero.

    Args:
        squares: the problem and its network.
        damping: λ.
        momentum: μ in [0, 1).
        sketch: columns K of a Nyström approximation of J Jᵀ; None takes all of it.
        norm: with momentum and a fixed step size, η is at most √norm / ‖φ‖; None does not bound it.
        lr: a fixed step size η, or None for the grid search.
        seed: of the sketches.
    """

    def __init__(
        self,
        squares: LeastSquares,
        damping: float,
        momentum: float = 0.0,
        sketch: int | None = None,
        norm: float | None = None,
        lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(squares, lr)
        self.damping, self.momentum, self.sketch, self.norm = damping, momentum, sketch, norm
        self.phi_P: Tensor | None = None
        self.generator = torch.Generator(squares.parameters[0].device).manual_seed(seed)

    @override
    @torch.no_grad()
    def direction(self, points: Mapping[str, Any]) -> tuple[Tensor, float]:
        rows = self.squares.rows(points)
        target_N = -rows.residual_N
        if self.phi_P is not None and self.momentum:
            target_N = target_N - self.momentum * rows.times(self.phi_P)
        step_P = rows.transposed(self._solve(rows, target_N))
        if self.momentum:
            self.phi_P = step_P if self.phi_P is None else step_P.add_(self.phi_P, alpha=self.momentum)
            step_P = self.phi_P / math.sqrt(1 - self.momentum ** (2 * (self.steps + 1)))
        return step_P, rows.residual_N.square().sum().item()

    @override
    def longest(self) -> float:
        """Return √norm / ‖φ‖, where φ is not bias corrected, as in the authors' code."""
        if self.norm is None or self.phi_P is None:
            return math.inf
        return math.sqrt(self.norm) / self.phi_P.norm().item()

    def _solve(self, rows: Rows, target_N: Tensor) -> Tensor:
        """Return (J Jᵀ + λ I)⁻¹ y, ``[N]``."""
        if self.sketch is not None:
            return nystrom_solve(rows, target_N, self.damping, self.sketch, self.generator)
        gram_NN = rows.gram()
        gram_NN.diagonal().add_(self.damping)
        factor_NN = torch.linalg.cholesky(gram_NN)
        return torch.cholesky_solve(target_N[:, None], factor_NN)[:, 0]


def nystrom_solve(rows: Rows, target_N: Tensor, damping: float, sketch: int, generator: torch.Generator) -> Tensor:
    """Return (B Bᵀ + λ I)⁻¹ y, ``[N]``, for the Nyström approximation B Bᵀ of J Jᵀ from a random test matrix.

    With Ω normal, ``[N, K]``, Y = J Jᵀ Ω + ν Ω and CᵀC = Ωᵀ Y: B = Y C⁻¹. The solve is Woodbury's, in K dimensions.
    """
    test_NK = target_N.new_empty(len(target_N), sketch).normal_(generator=generator)
    sketch_NK = rows.gram_times(test_NK).add_(test_NK, alpha=SHIFT)
    upper_KK = torch.linalg.cholesky(test_NK.T @ sketch_NK, upper=True)
    factor_NK = torch.linalg.solve_triangular(upper_KK, sketch_NK, upper=True, left=False)
    small_KK = factor_NK.T @ factor_NK
    small_KK.diagonal().add_(damping)
    inner_K1 = torch.cholesky_solve((factor_NK.T @ target_N)[:, None], torch.linalg.cholesky(small_KK))
    return (target_N - (factor_NK @ inner_K1)[:, 0]) / damping
