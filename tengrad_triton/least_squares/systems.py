"""The normal equations (J̃ᵀ J̃ + α I) δ = J̃ᵀ v of one step, solved for several v and several α.

Each has two equal forms, by the push-through identity:

    δ = (J̃ᵀ J̃ + α I)⁻¹ J̃ᵀ v = J̃ᵀ (J̃ J̃ᵀ + α I)⁻¹ v

The matrix of the first has a row for each parameter, that of the second one for each residual: the smaller is factored.
Neither form divides by α, as the Woodbury identity does for a gradient that is given alone, so that a small α costs no
digits.

Dimensions: R residuals, K entries of the trained parameters, k those of one block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

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

    @property
    def side(self) -> int:
        """The rows of the largest matrix that is factored."""
        return min(self._j_RK.shape)

    def image(self, delta_K: Tensor) -> Tensor:
        """Return J̃ δ [R]."""
        return self._j_RK @ delta_K

    def decrease(self, r_R: Tensor, delta_K: Tensor, image_R: Tensor) -> tuple[float, float]:
        """Return (2 ⟨r̃, J̃ δ⟩, ‖J̃ δ‖²): for a step of length η, ‖r̃‖² − ‖r̃ − η J̃ δ‖² is η the first − η² the second.

        ``image_R`` is J̃ δ.
        """
        return 2 * float(r_R @ image_R), float(image_R.square().sum())


def gram_of(x: Tensor, ops: Ops) -> Tensor:
    """Return X Xᵀ; on a GPU, X is copied unless it is contiguous."""
    gram: Tensor = ops.gram_rows([x if x.is_cpu else x.contiguous()], [0], 1)[0]
    return gram


class Block(System):
    """The system of one block's rows, stored.

    Args:
        j_RK: J̃ of the block; kept, not copied.
        ops: the kernels.
    """

    def __init__(self, j_RK: Tensor, ops: Ops) -> None:
        super().__init__(j_RK, ops)
        self.in_rows = len(j_RK) < j_RK.shape[1]
        self._matrix = gram_of(j_RK if self.in_rows else j_RK.mT, ops)

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

    @property
    @override
    def side(self) -> int:
        return max(block.side for block in self._blocks)

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
