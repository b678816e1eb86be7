"""Both products of explicit rows with a vector, in PyTorch: each is a pass over J.

On a CPU a large J goes in ranges, as a batch of row vectors times matrices: BLAS uses half of the memory's speed for
one vector, and torch a plain loop for a batch of column vectors.

Dimensions: N samples, K entries of a flat gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RANGES = (16, 8, 4, 2)  # as many as divide what is split
_LARGE = 1 << 18  # entries of J from which a batch is worth what it costs to begin (measured on two cores)


def add_projected_(y_N: Tensor, j_NK: Tensor, v_K: Tensor) -> None:
    """Y += J v."""
    ranges = _ranges(j_NK.shape[0], j_NK)
    if ranges == 1:
        y_N.addmv_(j_NK, v_K)
    else:
        y_N += torch.bmm(v_K.expand(ranges, 1, -1), j_NK.unflatten(0, (ranges, -1)).mT).flatten()


def combined(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """Jᵀ w."""
    ranges = _ranges(j_NK.shape[1], j_NK)
    if ranges == 1:
        return w_N @ j_NK
    return torch.bmm(w_N.expand(ranges, 1, -1), j_NK.unflatten(1, (ranges, -1)).transpose(0, 1)).flatten()


def _ranges(size: int, j_NK: Tensor) -> int:
    if not j_NK.is_cpu or j_NK.numel() < _LARGE:
        return 1
    return next((ranges for ranges in _RANGES if size % ranges == 0), 1)
