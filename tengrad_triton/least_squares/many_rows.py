"""The normal equations of steps with many residuals: sketched, of some of the rows, or in chunks.

Dimensions: R residuals, K entries of the trained parameters, S sketched directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.least_squares.systems import Block, System, gram_of

Chunks = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Computes r̃ and J̃ of one chunk of points after the other."""


class Sketched(System):
    """The system with a randomized Nyström approximation of J̃ J̃ᵀ, of S directions instead of R.

    With a random orthonormal Ω [R, S] and Y = J̃ J̃ᵀ Ω, it is K̂ = Y (Ωᵀ Y)⁻¹ Yᵀ = B Bᵀ, and

        (K̂ + α I)⁻¹ v = (v − B (Bᵀ B + α I)⁻¹ Bᵀ v) / α

    K̂ is at most J̃ J̃ᵀ, so that steps are no shorter than exact ones. See Guzmán-Cordero et al. 2025, section 3.3, and
    Tropp et al. 2017, algorithm 3. Here the inverse root of Ωᵀ Y is taken of its eigenvalues above rounding only, so
    that a J̃ J̃ᵀ of a rank below S, or of zeros, has one too.

    Args:
        j_RK: J̃ of all parameters.
        rank: S.
        generator: draws Ω.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, rank: int, generator: torch.Generator, ops: Ops) -> None:
        super().__init__(j_RK, ops)
        omega_RS = torch.randn(len(j_RK), rank, generator=generator, dtype=j_RK.dtype, device=j_RK.device)
        omega_RS = torch.linalg.qr(omega_RS).Q
        y_RS = j_RK @ (j_RK.mT @ omega_RS)
        core_SS = omega_RS.mT @ y_RS
        values_S, vectors_SS = torch.linalg.eigh((core_SS + core_SS.mT) / 2)
        above_S = values_S > rank * torch.finfo(j_RK.dtype).eps * y_RS.norm()
        b_RS = y_RS @ (vectors_SS * torch.where(above_S, values_S, torch.inf).rsqrt())
        u_RS, root_S, _ = torch.linalg.svd(b_RS, full_matrices=False)
        self._u_RS, self._values_S = u_RS, root_S.square()

    @property
    @override
    def side(self) -> int:
        return len(self._values_S)

    @override
    def factor(self, alpha: float) -> bool:
        self._alpha = alpha
        return True

    @override
    def direction(self, v_R: Tensor) -> Tensor:
        along_S = self._u_RS.mT @ v_R
        shrink_S = self._values_S / (self._values_S + self._alpha)
        return self._j_RK.mT @ ((v_R - self._u_RS @ (shrink_S * along_S)) / self._alpha)

    @property
    @override
    def trace(self) -> float:
        return float(self._values_S.sum())

    @override
    def spectrum(self) -> Tensor:
        return self._values_S


class Subset(Block):
    """The system of some of the rows, for the gradient of all of them.

    Args:
        j_RK: J̃ of the points that were drawn, as if they were all.
        gradient_K: J̃ᵀ r̃ of all points.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, gradient_K: Tensor, ops: Ops) -> None:
        super().__init__(j_RK, ops)
        self._gradient_K = gradient_K

    @override
    def factor(self, alpha: float) -> bool:
        self._alpha = alpha
        return super().factor(alpha)

    @override
    def direction(self, v_R: Tensor) -> Tensor:
        """Return δ for v = r̃, whose gradient is known; there is none for another v."""
        return self.of_gradient(self._gradient_K, self._alpha)

    @override
    def decrease(self, r_R: Tensor, delta_K: Tensor, image_R: Tensor) -> tuple[float, float]:
        return 2 * float(self._gradient_K @ delta_K), float(image_R.square().sum())


class Streamed(Block):
    """The system of more rows than memory holds, and than there are parameters: products with J̃ compute them again.

    Args:
        chunks: computes r̃ and J̃ of one chunk after the other.
        ops: the kernels.
    """

    in_rows = False

    def __init__(self, chunks: Chunks, ops: Ops) -> None:
        self._chunks, self._ops = chunks, ops
        rs, matrix = [], None
        for r, j_RK in chunks():
            gram_KK = gram_of(j_RK.mT, ops)
            matrix = gram_KK if matrix is None else matrix.add_(gram_KK)
            rs.append(r)
        assert matrix is not None
        self.r_R, self._matrix = torch.cat(rs), matrix

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    @override
    def direction(self, v_R: Tensor) -> Tensor:
        total_K, start = v_R.new_zeros(len(self._matrix)), 0
        for r, j_RK in self._chunks():
            total_K += j_RK.mT @ v_R[start : start + len(r)]
            start += len(r)
        return self._solved(total_K)

    @override
    def image(self, delta_K: Tensor) -> Tensor:
        return torch.cat([j_RK @ delta_K for _, j_RK in self._chunks()])

    @property
    @override
    def rows(self) -> int:
        return len(self.r_R)

    @property
    @override
    def side(self) -> int:
        return len(self._matrix)
