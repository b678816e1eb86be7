"""The products with J of which a step consists, in PyTorch, as fast as a CPU takes them.

A pass over explicit rows is as fast as memory: a large J goes in ranges, as a batch of row vectors times matrices, as
BLAS uses half of the memory's speed for one vector, and torch a plain loop for a batch of column vectors. Small ones of
one size that lie behind each other in memory are such a batch already.

Dimensions: T weights, N samples, K entries of a flat gradient; G, P, I and O as in `reuse`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .spec import widen

_PARTS = (16, 8, 4, 2)
_LARGE = 1 << 18  # entries of J from which a batch is worth what it costs to begin (measured on two cores)
_FEW = 8  # matrices below which a batch of them costs more than their own calls


def add_projections_(y_LN: Tensor, j: Sequence[Tensor], v: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Add J_t v_t to the first entries of y_LN[rows[t]], for every t."""
    for members, j_TNK in _batches(j):
        if j_TNK is None:
            y = y_LN.unbind()
            for t in members:
                y_N, n = y[rows[t]], j[t].shape[0]
                _add_projected_(y_N if n == y_N.shape[0] else y_N[:n], widen(j[t]), v[t].reshape(-1).to(y_LN.dtype))
        else:
            v_T1K = _stacked([v[t] for t in members]).to(y_LN.dtype)
            y_TN = torch.bmm(v_T1K, widen(j_TNK).mT).squeeze(1)
            y_LN[:, : y_TN.shape[1]].index_add_(0, torch.tensor([rows[t] for t in members]), y_TN)


def _stacked(v: Sequence[Tensor]) -> Tensor:
    """Return tensors of as many entries, flat, as one of [T, 1, K]."""
    alike = all(x.shape == v[0].shape for x in v)  # which spares a call for each
    return torch.stack(list(v) if alike else [x.reshape(-1) for x in v]).flatten(1).unsqueeze(1)


def _add_projected_(y_N: Tensor, j_NK: Tensor, v_K: Tensor) -> None:
    ranges = _ranges(j_NK.shape[0], j_NK)
    if ranges == 1:
        y_N.addmv_(j_NK, v_K)
    else:
        y_N.add_(torch.bmm(v_K.expand(ranges, 1, -1), j_NK.unflatten(0, (ranges, -1)).mT).flatten())


def combinations(j: Sequence[Tensor], w: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield t and J_tᵀ w_t for every t."""
    for members, j_TNK in _batches(j):
        if j_TNK is None:
            yield from ((t, _combined(widen(j[t]), w[t])) for t in members)
        else:
            w_T1N = _stacked([w[t] for t in members])
            yield from zip(members, torch.bmm(w_T1N, widen(j_TNK)).squeeze(1).unbind(), strict=True)


def _combined(j_NK: Tensor, w_N: Tensor) -> Tensor:
    ranges = _ranges(j_NK.shape[1], j_NK)
    if ranges == 1:
        return w_N @ j_NK
    return torch.bmm(w_N.expand(ranges, 1, -1), j_NK.unflatten(1, (ranges, -1)).transpose(0, 1)).flatten()


def _ranges(size: int, j_NK: Tensor) -> int:
    if not j_NK.is_cpu or j_NK.numel() < _LARGE:
        return 1
    return _parts(size, _PARTS[0])


def _parts(size: int, most: int) -> int:
    """Return in how many equal parts something can go."""
    return next((parts for parts in _PARTS if parts <= most and size % parts == 0), 1)


def worth_a_batch(j: Sequence[Tensor]) -> bool:
    """Whether matrices of one size are better multiplied in one call: as many small ones on a CPU."""
    return len(j) >= _FEW and j[0].is_cpu and j[0].numel() < _LARGE and not torch.compiler.is_compiling()


def _batches(j: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Tensor | None]]:
    """Yield which matrices lie behind each other, with the one tensor that they are; and all others, with None."""
    alone: list[int] = []
    sizes: dict[int, list[int]] = {}
    for t, j_NK in enumerate(j):
        sizes.setdefault(j_NK.numel(), []).append(t)
    for members in sizes.values():
        alike = [j[t] for t in members]
        together = _together(alike) if worth_a_batch(alike) else None
        if together is None:
            alone += members
        else:
            yield members, together
    if alone:
        yield alone, None


def _together(j: Sequence[Tensor]) -> Tensor | None:
    """Return matrices that lie behind each other as the one tensor that they are, without a copy."""
    first, last = j[0], j[-1]
    start, size = first.data_ptr(), first.nbytes
    if last.data_ptr() != start + (len(j) - 1) * size:
        return None
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    if all(x.data_ptr() == start + t * size and x.shape == first.shape and x.is_contiguous() for t, x in enumerate(j)):
        return first.as_strided((len(j), *first.shape), (first.numel(), *first.stride()))
    return None


def projected_outer(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """Return y_N with y_n = Σ_γp ⟨V_γ a_nγp, g_nγp⟩."""
    if not _is_matrix(g_NGPO):
        return (torch.einsum("ngpi,goi->ngpo", a_NGPI, v_GOI) * g_NGPO).sum((1, 2, 3))
    va_ON = v_GOI.flatten(0, 1) @ a_NGPI.flatten(0, 2).mT  # BLAS is faster this way round where samples are few
    return (va_ON * g_NGPO.flatten(0, 2).mT).sum(0)


def combined_outer(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """Return Σ_np w_n g_nγp a_nγpᵀ over [G, O, I]."""
    weighted_NGPO = g_NGPO * w_N.view(-1, 1, 1, 1)
    if not _is_matrix(g_NGPO):
        return torch.einsum("ngpo,ngpi->goi", weighted_NGPO, a_NGPI)
    outputs = g_NGPO.shape[3]
    parts = 1 if torch.compiler.is_compiling() else _parts(outputs, torch.get_num_threads())
    # A part of the outputs for every thread: BLAS divides a product as thin as this less well.
    weighted_TON = weighted_NGPO.reshape(-1, parts, outputs // parts).permute(1, 2, 0)
    return torch.bmm(weighted_TON, a_NGPI.flatten(0, 2).expand(parts, -1, -1)).view(1, outputs, -1)


def _is_matrix(g_NGPO: Tensor) -> bool:
    return g_NGPO.is_cpu and g_NGPO.shape[1] == g_NGPO.shape[2] == 1
