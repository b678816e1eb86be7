"""Inverses and eigenvectors of many small symmetric matrices. Matrices of one size are computed in one call.

Dimensions: B matrices of a stack, G groups of a layer, I the size of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Factorize = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from a stack of matrices m_BII to a stack of the same shape, and a boolean [B] that marks failures."""


def by_size(factorize: Factorize, matrices: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return ``factorize`` of each matrix, and how many of them failed. Matrices of one size are joined in one call.

    Args:
        factorize: called once for each size.
        matrices: stacks m_GII, whose G and I may be different.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    failures = torch.zeros((), dtype=torch.long)
    for size in sorted({matrix.shape[-1] for matrix in matrices}):
        alike = [index for index, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        stacks = [matrices[index] for index in alike]
        done, failed_B = factorize(stacks[0] if len(stacks) == 1 else torch.cat(stacks))
        for index, part in zip(alike, done.split([len(stack) for stack in stacks]), strict=True):
            results[index] = part
        failures = failures.to(failed_B.device) + failed_B.sum()
    return results, failures


def inverse(m_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of positive definite matrices, and which matrices rounding has made indefinite.

    The inverse of an indefinite matrix is replaced by I / trace. No eigenvalue exceeds the trace, so no component of a
    step is longer with the replacement than with the inverse.
    """
    factor_BII, info_B = torch.linalg.cholesky_ex(m_BII)
    failed_B = info_B != 0
    factor_BII.masked_fill_(failed_B[:, None, None], 0.0).diagonal(dim1=1, dim2=2).masked_fill_(failed_B[:, None], 1.0)
    trace_B = m_BII.diagonal(dim1=1, dim2=2).sum(1)
    return torch.cholesky_inverse(factor_BII).div_(torch.where(failed_B, trace_B, 1.0)[:, None, None]), failed_B


def eigenbasis(m_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of symmetric matrices as columns, and which of the matrices are not finite.

    The eigenvectors of a matrix that is not finite are replaced by the identity.
    """
    failed_B = ~m_BII.isfinite().flatten(1).all(1)
    safe_BII = m_BII.masked_fill(failed_B[:, None, None], 0.0)
    if m_BII.device.type == "cpu":  # in single precision LAPACK raises or returns NaN for matrices of low rank
        safe_BII = safe_BII.double()
    return torch.linalg.eigh(safe_BII).eigenvectors.to(m_BII.dtype), failed_B


def add_to_diagonal(m_GII: Tensor, shift_G: Tensor) -> Tensor:
    """Return M + shift I for each group."""
    sum_GII = m_GII.clone()
    sum_GII.diagonal(dim1=1, dim2=2).add_(shift_G[:, None])
    return sum_GII
