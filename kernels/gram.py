"""Gram matrices K[n, m] = ⟨J_n, J_m⟩ of per-sample gradients, without forming them where that is cheaper.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLAB_ELEMENTS = 1 << 26  # how many entries of the covariance factors the definition holds at a time


def gram(a: list[Tensor], g: list[Tensor]) -> Tensor:
    """Return k_LNN, the Gram matrix of every layer, from its inputs and output derivatives."""
    return gram_reference(a, g)


def gram_reference(a: list[Tensor], g: list[Tensor]) -> Tensor:
    """K[n, m] = Σ_γpq ⟨a_nγp, a_mγq⟩ ⟨g_nγp, g_mγq⟩ (paper, equations 5 and 11), a slab of rows n at a time."""
    return torch.stack([_layer_gram(a_NGPI, g_NGPO) for a_NGPI, g_NGPO in zip(a, g, strict=True)])


def _layer_gram(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    n, groups, positions, _ = a_NGPI.shape
    slab = max(1, _SLAB_ELEMENTS // (groups * positions * n * positions))
    rows = []
    for a_SGPI, g_SGPO in zip(a_NGPI.split(slab), g_NGPO.split(slab), strict=True):
        aa = torch.einsum("ngpi,mgqi->gnpmq", a_SGPI, a_NGPI)
        gg = torch.einsum("ngpo,mgqo->gnpmq", g_SGPO, g_NGPO)
        rows.append((aa * gg).sum((0, 2, 4)))
    return torch.cat(rows)


def gram_rows(j_NK: Tensor) -> Tensor:
    """Return k_NN = J Jᵀ for explicit per-sample gradients."""
    return gram_rows_reference(j_NK)


def gram_rows_reference(j_NK: Tensor) -> Tensor:
    """K = J Jᵀ."""
    return j_NK @ j_NK.mT
