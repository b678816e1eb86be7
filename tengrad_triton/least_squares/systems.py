"""The normal equations (J̃ᵀ J̃ + α I) δ = J̃ᵀ v of one step, solved for several v and several α.

Each has two equal forms, by the push-through identity:

    δ = (J̃ᵀ J̃ + α I)⁻¹ J̃ᵀ v = J̃ᵀ (J̃ J̃ᵀ + α I)⁻¹ v

The matrix of the first has a row for each parameter, that of the second one for each residual: the smaller is factored.
Neither form divides by α, as the Woodbury identity does for a gradient that is given alone, so that a small α costs no
digits.

Dimensions: R residuals, K entries of the trained parameters, k those of one block, S sketched directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.curvature.choices import Ops


class System(ABC):
    """The normal equations of one step. `factor` comes before `direction`.

    Args:
        j_RK: J̃ of all parameters; kept, not copied.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, ops: Ops) -> None:
        self._j_RK, self._ops = j_RK, ops

    @abstractmethod
    def factor(self, alpha: float) -> bool:
        """Factor the damped matrix; return whether that succeeded, which rounding prevents for a very small α."""

    @abstractmethod
    def direction(self, v_R: Tensor) -> Tensor:
        """Return δ [K] = (J̃ᵀ J̃ + α I)⁻¹ J̃ᵀ v."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """The sum of the eigenvalues of J̃ᵀ J̃."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of J̃."""
        return self._j_RK.dtype

    @property
    def least_damping(self) -> float:
        """The smallest α that makes a difference to J̃ᵀ J̃ in the precision of J̃."""
        return 1e-2 * float(torch.finfo(self.dtype).eps) * self.trace

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Return the eigenvalues of J̃ᵀ J̃ that need not be zero, min(R, K) of them."""

    @property
    def rows(self) -> int:
        """How many rows J̃ has."""
        return len(self._j_RK)

    def image(self, delta_K: Tensor) -> Tensor:
        """Return J̃ δ [R]."""
        return self._j_RK @ delta_K

    def decrease(self, r_R: Tensor, delta_K: Tensor) -> tuple[float, float]:
        """Return (2 ⟨r̃, J̃ δ⟩, ‖J̃ δ‖²): for a step of length η, ‖r̃‖² − ‖r̃ − η J̃ δ‖² is η the first − η² the second."""
        image_R = self.image(delta_K)
        return 2 * float(r_R @ image_R), float(image_R.square().sum())


class Block(System):
    """The system of one block's rows, stored.

    Args:
        j_RK: J̃ of the block; kept, not copied.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, ops: Ops) -> None:
        super().__init__(j_RK, ops)
        self.in_rows = len(j_RK) < j_RK.shape[1]
        x = j_RK if self.in_rows else j_RK.mT
        self._matrix = ops.gram_rows([x if x.is_cpu else x.contiguous()], [0], 1)[0]
        self._inverse = self._matrix.new_empty(0)

    @override
    def factor(self, alpha: float) -> bool:
        shift = torch.full((1,), alpha, dtype=self._matrix.dtype, device=self._matrix.device)
        factor, pivot = self._ops.cholesky(self._matrix[None], shift)
        self._factor = factor[0]
        return bool(pivot[0] > 0)

    def _solved(self, b: Tensor) -> Tensor:
        return torch.cholesky_solve(b[:, None], self._factor)[:, 0]

    def of_gradient(self, gradient_K: Tensor, alpha: float) -> Tensor:
        """Return (J̃ᵀ J̃ + α I)⁻¹ g of a gradient that is not J̃ᵀ times known residuals, by Woodbury's identity."""
        if not self.in_rows:
            return self._solved(gradient_K.to(self._matrix.dtype)).to(gradient_K.dtype)
        w_R = self._solved((self._j_RK @ gradient_K).to(self._matrix.dtype)).to(gradient_K.dtype)
        return (gradient_K - self._j_RK.mT @ w_R) / alpha

    @override
    def direction(self, v_R: Tensor) -> Tensor:
        if self.in_rows:
            return self._j_RK.mT @ self._solved(v_R.to(self._matrix.dtype)).to(v_R.dtype)
        return self._solved((self._j_RK.mT @ v_R).to(self._matrix.dtype)).to(v_R.dtype)

    @property
    @override
    def trace(self) -> float:
        return float(self._matrix.diagonal().sum())

    @override
    def spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh(self._matrix).clamp_(min=0)


class Blocks(System):
    """The systems of several blocks of parameters, each of which is solved alone.

    Args:
        j_RK: J̃ of all parameters.
        columns: the columns of each block, which together are all of them.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, columns: Sequence[Tensor], ops: Ops) -> None:
        super().__init__(j_RK, ops)
        self._columns = columns
        self._blocks = [Block(j_RK[:, own].contiguous(), ops) for own in columns]

    @override
    def factor(self, alpha: float) -> bool:
        factored = [block.factor(alpha) for block in self._blocks]
        return all(factored)

    @override
    def direction(self, v_R: Tensor) -> Tensor:
        delta_K = v_R.new_empty(self._j_RK.shape[1])
        for own, block in zip(self._columns, self._blocks, strict=True):
            delta_K[own] = block.direction(v_R)
        return delta_K

    @property
    @override
    def trace(self) -> float:
        return sum(block.trace for block in self._blocks)

    @override
    def spectrum(self) -> Tensor:
        return torch.cat([block.spectrum() for block in self._blocks])


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
    def decrease(self, r_R: Tensor, delta_K: Tensor) -> tuple[float, float]:
        return 2 * float(self._gradient_K @ delta_K), float(self.image(delta_K).square().sum())


class Streamed(Block):
    """The system of more rows than memory holds: each product with J̃ computes them again, chunk by chunk.

    Args:
        chunks: computes r̃ and J̃ of one chunk after the other.
        parameters: K, fewer than the rows.
        ops: the kernels.
    """

    in_rows = False

    def __init__(self, chunks: Callable[[], Iterator[tuple[Tensor, Tensor]]], parameters: int, ops: Ops) -> None:
        self._chunks, self._ops = chunks, ops
        rs, matrix = [], None
        for r, j_RK in chunks():
            matrix = j_RK.new_zeros(parameters, parameters) if matrix is None else matrix
            matrix.addmm_(j_RK.mT, j_RK)
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

    def norm(self) -> Tensor:
        """Return ‖J̃‖, the root of the sum of its squares."""
        return self._matrix.trace().sqrt()
