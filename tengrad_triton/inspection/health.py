"""How well the blocks of a curvature were factored, and what they take: for `optimizer.stats`.

Dimensions: B blocks of one size, N rows of J.
"""

from __future__ import annotations

from tengrad_triton.curvature.woodbury import Curvature


def pivots_of(curvature: Curvature) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest pivot of each block's K + N α I, over N α; zeros where it failed.

    The pivots are the squares C_ii² of the diagonal of C in C Cᵀ = K + N α I (M5), and for a compressed block the
    eigenvalues that are kept (M7). Without rounding none is below 1.
    """
    if curvature.is_released:
        return {}
    shifts = dict(zip(curvature.blocks, (curvature.rows * curvature.damping_L).tolist(), strict=True))
    found = {}
    for factors in curvature.inverses:
        diagonal_BN = factors.inverse_BNN.diagonal(dim1=1, dim2=2).cpu().double()  # one copy for all of a size
        for block, diagonal_N in zip(factors.blocks, diagonal_BN.unbind(), strict=True):
            kept = diagonal_N[diagonal_N != 0]
            pivots = kept.pow(-2) / shifts[block]
            found[block] = (pivots.min().item(), pivots.max().item()) if len(kept) else (0.0, 0.0)
    return {block: found[block] for block in curvature.blocks}


def bytes_of(curvature: Curvature) -> dict[str, int]:
    """Return the bytes of each block's J and of its factored matrix."""
    factors = {
        block: one.inverse_BNN[place].nbytes for one in curvature.inverses for place, block in enumerate(one.blocks)
    }
    return {
        block: factors.get(block, 0) + sum(j.nbytes for name in names for j in curvature.jacobians[name].values())
        for block, names in curvature.blocks.items()
    }
