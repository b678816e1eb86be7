"""Batched Cholesky factorization of small damped Gram matrices: factor, inverse of the factor, solve.

Dimensions: L matrices, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor K + shift I = C Cᵀ for every matrix; return the lower factors c_LNN and the smallest pivots pivot_L.

    Never synchronizes with the device and never raises for a matrix that is not positive definite: its smallest pivot
    (the square of the smallest diagonal entry of C) is then zero, negative or NaN, and its factor must not be used.
    """
    return cholesky_reference(k_LNN, shift_L)


def cholesky_reference(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """C = chol(K + shift I)."""
    eye_NN = torch.eye(k_LNN.shape[-1], dtype=k_LNN.dtype, device=k_LNN.device)
    c_LNN, info_L = torch.linalg.cholesky_ex(k_LNN + shift_L[:, None, None] * eye_NN, check_errors=False)
    pivot_L = c_LNN.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return c_LNN, torch.where(info_L == 0, pivot_L, -torch.ones_like(pivot_L))


def cholesky_inverse(c_LNN: Tensor) -> Tensor:
    """Return w_LNN = C⁻¹ of lower factors: two matrix-vector products then replace each pair of triangular solves."""
    return cholesky_inverse_reference(c_LNN)


def cholesky_inverse_reference(c_LNN: Tensor) -> Tensor:
    """W = C⁻¹."""
    eye_NN = torch.eye(c_LNN.shape[-1], dtype=c_LNN.dtype, device=c_LNN.device)
    return torch.linalg.solve_triangular(c_LNN, eye_NN.expand_as(c_LNN), upper=False)


def cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Return z_LN = (K + shift I)⁻¹ y = Wᵀ (W y)."""
    return cholesky_solve_reference(w_LNN, y_LN)


def cholesky_solve_reference(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Z = Wᵀ (W y)."""
    return (w_LNN.mT @ (w_LNN @ y_LN.unsqueeze(-1))).squeeze(-1)
