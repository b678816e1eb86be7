"""The tuned PyTorch code of the ops (`KernelSpec.torch_impl`): Gram matrices, their factorization, and products with J.

It runs on CPU tensors, in float64, and with ``backend="torch"``. A function with the name of an op computes what the
op's docstring says; its docstring here says how it is made fast. The thresholds were measured on two cores. `cpu_conv`
has the convolutions and `cpu_update` the updates. All of it is tested against `reference`.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; R pairs of a sample and a position, S
those pairs in one slab of samples; K entries of a flat gradient, L Fisher blocks; B matrices of one batched product.
The index t counts weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import widen, zeros

_PAIRS_AT_ONCE = 1 << 26  # `gram` keeps products for at most this many pairs of positions at a time
_SLABS = 8  # X Xᵀ is computed in at most this many slabs of samples
_MANY_SAMPLES = 256  # from here on, slabs of few columns are faster than one product too
_LEAST_SLAB, _LEAST_COLUMNS = 32, 4096  # with fewer samples in a slab, or few samples and columns, one is faster
_RANGES = (16, 8, 4, 2)  # a large J is divided into one of these numbers of equal ranges
_LARGE = 1 << 18  # with fewer entries of J, one product is faster than ranges
_LEAST_BATCH = 8  # with fewer matrices, one call for each is faster than a batched product


def gram(a: list[Tensor], g: list[Tensor], blocks: list[int], count: int) -> Tensor:
    """Add up the layers' Gram matrices."""
    k_LNN = zeros(a[0], count, len(a[0]), len(a[0]))
    k = k_LNN.unbind()
    for block, a_NGPI, g_NGPO in zip(blocks, a, g, strict=True):
        k[block].add_(_gram_of_layer(widen(a_NGPI), widen(g_NGPO)))
    return k_LNN


def _gram_of_layer(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """Return (A Aᵀ) ∘ (G Gᵀ), summed over pairs of positions, one slab of samples at a time to bound the memory."""
    n, groups, positions, _ = a_NGPI.shape
    if groups == positions == 1:
        a_NI, g_NO = a_NGPI.flatten(0, 2), g_NGPO.flatten(0, 2)
        return _gram_of_rows(a_NI).mul_(_gram_of_rows(g_NO))
    a_GRI, g_GRO = (x.transpose(0, 1).flatten(1, 2) for x in (a_NGPI, g_NGPO))
    slab = positions * max(1, _PAIRS_AT_ONCE // (groups * positions * n * positions))
    parts = []
    for a_GSI, g_GSO in zip(a_GRI.split(slab, 1), g_GRO.split(slab, 1), strict=True):
        pairs_GSR = (a_GSI @ a_GRI.mT) * (g_GSO @ g_GRO.mT)
        parts.append(pairs_GSR.view(groups, -1, positions, n, positions).sum((0, 2, 4)))
    return torch.cat(parts)


def gram_rows(j: list[Tensor], blocks: list[int], count: int) -> Tensor:
    """Add the products J Jᵀ to their blocks in place."""
    k_LNN = zeros(j[0], count, len(j[0]), len(j[0]))
    k = k_LNN.unbind()
    for block, j_NK in zip(blocks, j, strict=True):
        add_gram_of_rows_(k[block], widen(j_NK))
    return k_LNN


def _gram_of_rows(x_NK: Tensor) -> Tensor:
    """Return X Xᵀ."""
    if _slabs_of(x_NK) < 2:
        return x_NK @ x_NK.mT
    return add_gram_of_rows_(x_NK.new_zeros(len(x_NK), len(x_NK)), x_NK)


def _slabs_of(x_NK: Tensor) -> int:
    """Return the number of slabs in which X Xᵀ is computed."""
    n, k = x_NK.shape
    is_small = n < _MANY_SAMPLES and k < _LEAST_COLUMNS
    is_one = is_small or not x_NK.is_cpu or torch.compiler.is_compiling()
    return 1 if is_one else min(_SLABS, n // _LEAST_SLAB)


def add_gram_of_rows_(k_NN: Tensor, x_NK: Tensor) -> Tensor:
    """Add X Xᵀ to K.

    On a CPU each slab of samples is multiplied only up to the diagonal; the other half of K is copied. One call of BLAS
    would compute both halves.
    """
    n, slabs = len(x_NK), _slabs_of(x_NK)
    if slabs < 2:
        return k_NN.addmm_(x_NK, x_NK.mT)
    step = -(-n // slabs)
    for start in range(0, n, step):
        end = min(n, start + step)
        k_NN[start:end, :end].addmm_(x_NK[start:end], x_NK[:end].mT)
        k_NN[:start, start:end] = k_NN[start:end, :start].mT
    return k_NN


def cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor without a synchronization; the smallest pivot of a matrix that is not positive definite is −1."""
    damped_LNN = k_LNN.clone()
    damped_LNN.diagonal(dim1=-2, dim2=-1).add_(shift_L.unsqueeze(1))
    c_LNN, info_L = torch.linalg.cholesky_ex(damped_LNN, check_errors=False)
    pivot_L = c_LNN.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return c_LNN, torch.where(info_L == 0, pivot_L, -torch.ones_like(pivot_L))


def cholesky_inverse(c_LNN: Tensor) -> Tensor:
    """Solve W C = I by substitution, which takes three quarters of the time of C W = I."""
    eye_NN = torch.eye(c_LNN.shape[-1], dtype=c_LNN.dtype, device=c_LNN.device)
    w_LNN: Tensor = torch.linalg.solve_triangular(c_LNN, eye_NN.expand_as(c_LNN), upper=False, left=False)
    return w_LNN


def cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Multiply vectors by matrices from the left: matrix times vector is half as fast in BLAS."""
    return torch.bmm(torch.bmm(y_LN.unsqueeze(1), w_LNN.mT), w_LNN).squeeze(1)


def project(a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
    """Add up the layers' ⟨V a, g⟩."""
    y_LN = zeros(a[0], *shape)
    y = y_LN.unbind()
    for block, a_NGPI, g_NGPO, v_OTI in zip(blocks, a, g, v, strict=True):
        v_GOI = v_OTI.reshape(g_NGPO.shape[1], g_NGPO.shape[3], -1).to(y_LN.dtype)
        y[block][: len(a_NGPI)].add_(project_outer_products(widen(a_NGPI), g_NGPO, v_GOI))
    return y_LN


def project_outer_products(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """Return y_N with y_n = Σ_γp ⟨V_γ a_nγp, g_nγp⟩."""
    if not has_one_position(g_NGPO):
        return (torch.einsum("ngpi,goi->ngpo", a_NGPI, v_GOI) * g_NGPO).sum((1, 2, 3))
    va_ON = v_GOI.flatten(0, 1) @ a_NGPI.flatten(0, 2).mT  # for few samples BLAS is faster in this order
    return (va_ON * g_NGPO.flatten(0, 2).mT).sum(0)


def weighted_outer_products(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """Return Σ_np w_n g_nγp a_nγpᵀ over [G, O, I]."""
    weighted_NGPO = g_NGPO * w_N.view(-1, 1, 1, 1)
    if not has_one_position(g_NGPO):
        return torch.einsum("ngpo,ngpi->goi", weighted_NGPO, a_NGPI)
    return torch.bmm(*_thin_product(a_NGPI, weighted_NGPO)).view(1, g_NGPO.shape[3], -1)


def add_weighted_outer_products_(x_OI: Tensor, a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> None:
    """Add Σ_n w_n g_n a_nᵀ to a contiguous matrix in place, for one position (`has_one_position`)."""
    g_BON, a_BNI = _thin_product(a_NGPI, g_NGPO * w_N.view(-1, 1, 1, 1))
    x_OI.view(len(g_BON), g_BON.shape[1], -1).baddbmm_(g_BON, a_BNI)


def _thin_product(a_NGPI: Tensor, g_NGPO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of Gᵀ A as batched ones, with one range of the outputs for each thread.

    BLAS does not divide such a thin product well among threads.
    """
    outputs = g_NGPO.shape[3]
    parts = 1 if torch.compiler.is_compiling() else _equal_ranges(outputs, torch.get_num_threads())
    g_BON = g_NGPO.reshape(-1, parts, outputs // parts).permute(1, 2, 0)
    return g_BON, a_NGPI.flatten(0, 2).expand(parts, -1, -1)


def has_one_position(g_NGPO: Tensor) -> bool:
    """Return whether G = P = 1 on a CPU, where the factors are matrices and one product of BLAS is fastest."""
    return g_NGPO.is_cpu and g_NGPO.shape[1] == g_NGPO.shape[2] == 1


def project_rows(j: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int]) -> Tensor:
    """Add up the products J v; one batched call multiplies all matrices that `adjacent_matrices` finds."""
    y_LN = zeros(j[0], *shape)
    y = y_LN.unbind()
    for indices, j_BNK in adjacent_matrices(j):
        if j_BNK is None:
            for t in indices:
                y_N, n = y[blocks[t]], len(j[t])
                _add_product_(y_N if n == len(y_N) else y_N[:n], widen(j[t]), v[t].reshape(-1).to(y_LN.dtype))
        else:
            v_B1K = _stacked_vectors([v[t] for t in indices]).to(y_LN.dtype)
            y_BN = torch.bmm(v_B1K, widen(j_BNK).mT).squeeze(1)
            y_LN[:, : y_BN.shape[1]].index_add_(0, torch.tensor([blocks[t] for t in indices]), y_BN)
    return y_LN


def _add_product_(y_N: Tensor, j_NK: Tensor, v_K: Tensor) -> None:
    """Add J v. A large J is divided into ranges of its samples, for a batched product (see `cholesky_solve`)."""
    ranges = _ranges_of(len(j_NK), j_NK)
    if ranges == 1:
        y_N.addmv_(j_NK, v_K)
    else:
        y_N.add_(torch.bmm(v_K.expand(ranges, 1, -1), j_NK.unflatten(0, (ranges, -1)).mT).flatten())


def expansions(j: Sequence[Tensor], w: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield t and J_tᵀ w_t for every weight, in any order."""
    for indices, j_BNK in adjacent_matrices(j):
        if j_BNK is None:
            yield from ((t, _expansion(widen(j[t]), w[t])) for t in indices)
        else:
            wide_BNK = widen(j_BNK)
            w_B1N = _stacked_vectors([w[t] for t in indices]).to(wide_BNK.dtype)
            yield from zip(indices, torch.bmm(w_B1N, wide_BNK).squeeze(1).unbind(), strict=True)


def _expansion(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """Return Jᵀ w. A large J is divided into ranges of its columns, for a batched product."""
    ranges, w_N = _ranges_of(j_NK.shape[1], j_NK), w_N.to(j_NK.dtype)  # a float64 block may have rows in bfloat16
    if ranges == 1:
        return w_N @ j_NK
    return torch.bmm(w_N.expand(ranges, 1, -1), j_NK.unflatten(1, (ranges, -1)).transpose(0, 1)).flatten()


def _ranges_of(size: int, j_NK: Tensor) -> int:
    if not j_NK.is_cpu or j_NK.numel() < _LARGE:
        return 1
    return _equal_ranges(size, _RANGES[0])


def _equal_ranges(size: int, most: int) -> int:
    """Return into how many equal ranges a dimension of this size divides: at most ``most``."""
    return next((ranges for ranges in _RANGES if ranges <= most and size % ranges == 0), 1)


def _stacked_vectors(x: Sequence[Tensor]) -> Tensor:
    """Return tensors of the same number of entries as vectors [B, 1, K]."""
    same = all(tensor.shape == x[0].shape for tensor in x)
    # With equal shapes they are flattened in one call, and not one by one.
    return torch.stack(list(x) if same else [tensor.reshape(-1) for tensor in x]).flatten(1).unsqueeze(1)


def worth_a_batch(j: Sequence[Tensor]) -> bool:
    """Return whether a batched product of matrices of one size is faster: if they are many and small, on a CPU."""
    return len(j) >= _LEAST_BATCH and j[0].is_cpu and j[0].numel() < _LARGE and not torch.compiler.is_compiling()


def adjacent_matrices(j: Sequence[Tensor]) -> Iterator[tuple[Sequence[int], Tensor | None]]:
    """Yield indices of matrices that are adjacent in memory and the tensor j_BNK of them; yield the rest with None."""
    others: list[int] = []
    sizes: dict[int, list[int]] = {}
    for t, j_NK in enumerate(j):
        sizes.setdefault(j_NK.numel(), []).append(t)
    for indices in sizes.values():
        matrices = [j[t] for t in indices]
        j_BNK = as_one_tensor(matrices) if worth_a_batch(matrices) else None
        if j_BNK is None:
            others += indices
        else:
            yield indices, j_BNK
    if others:
        yield others, None


def as_one_tensor(j: Sequence[Tensor]) -> Tensor | None:
    """Return a view [B, N, K] of matrices that are adjacent in memory, or None if they are not."""
    first, last = j[0], j[-1]
    start, size = first.data_ptr(), first.nbytes
    if last.data_ptr() != start + (len(j) - 1) * size:
        return None
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    if all(x.data_ptr() == start + t * size and x.shape == first.shape and x.is_contiguous() for t, x in enumerate(j)):
        return first.as_strided((len(j), *first.shape), (first.numel(), *first.stride()))
    return None
