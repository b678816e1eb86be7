# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Batched Cholesky factorization of small damped Gram matrices.

One program factors one matrix. So a matrix that is not positive definite does not change the results of others, and a
batch takes as long as one matrix. Torch is faster for N > 512, and for N > 256 with one or two matrices.

Dimensions: L matrices of size N × N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import contiguous, define_op, expect, last_contiguous, runs_kernel
from .primitives import load_tile
from .spec import Example, KernelSpec, nbytes, normal, single_config, tiling, tl, triton

LARGEST_BATCHED = 512  # kernels factor and solve matrices up to this size, if there are more than two
TILE = 32  # size of a diagonal tile: a larger tile has a longer chain of dependent columns, but there are fewer panels


@define_op()
def cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor K + shift I = C Cᵀ for every matrix (M5).

    The op does not synchronize with the device, so it does not raise for a matrix that is not positive definite. The
    smallest pivot of such a matrix is zero, negative or NaN, and its factor must not be used.

    Args:
        k_LNN: symmetric matrices; only the lower triangle is read.
        shift_L: for each matrix the number that is added to its diagonal.

    Returns:
        The lower factors c_LNN, and pivot_L, the square of the smallest diagonal entry of each factor.

    Raises:
        ValueError: the matrices are not square, or the number of shifts is not L.
    """
    expect("k_LNN", k_LNN, shift_L.shape[0], k_LNN.shape[1], k_LNN.shape[1])
    return (_cholesky if is_small(k_LNN, shift_L) else cpu.cholesky)(k_LNN, shift_L)


def is_small(x_LNN: Tensor, vectors: Tensor) -> bool:
    """Return whether a kernel accepts these matrices and is faster than torch: if they are many, or small."""
    matrices, n = x_LNN.shape[:2]
    exact = x_LNN.dtype == vectors.dtype == torch.float32
    return exact and runs_kernel(x_LNN, vectors) and n <= (LARGEST_BATCHED if matrices > 2 else 256)


@triton.jit
def _add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def _eliminate(tile, BLOCK: tl.constexpr):
    """Return the lower factor of a symmetric tile, its inverse, and its pivots.

    The factorization is LDLᵀ. It takes all square roots at the end, so no column waits for a square root. Two measures
    keep the error below twice torch's: eliminated terms are summed first and subtracted at once, and quotients and
    roots are correctly rounded. Below the diagonal, the finished columns of `packed` hold the inverse of the unit
    lower factor; above the diagonal, `packed` holds the upper factor times D.
    """
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    eliminated = tl.zeros((BLOCK, BLOCK), tl.float32)
    pivots = tl.zeros((BLOCK,), tl.float32)
    for j in range(BLOCK):
        packed = tile - eliminated
        below = tl.sum(tl.where(col == j, packed, 0.0), 1)[:, None]
        everywhere = tl.broadcast_to(below, (BLOCK, BLOCK))
        # One reduction gives every column the pivot, and its own entry in line j.
        across, pivot = tl.reduce((tl.where(row == j, packed, 0.0), tl.where(row == j, everywhere, 0.0)), 0, _add_pair)
        scaled = tl.div_rn(tl.where(col == j, 1.0, across[None, :]), pivot[None, :])
        pivots = tl.where(tl.arange(0, BLOCK) == j, pivot, pivots)
        # The eliminated column becomes a column of the inverse.
        begins = (row > j) & (col == j)
        tile = tl.where(begins, 0.0, tile)
        eliminated = tl.where(begins, 0.0, eliminated) + tl.where(row > j, below, 0.0) * scaled
    packed = tile - eliminated
    root = tl.sqrt_rn(pivots)[:, None]
    # One division serves both results: a second one needs registers that Triton 3.8 spills.
    quotient = tl.div_rn(tl.where(row == col, 1.0, packed), root)
    lower = tl.trans(tl.where(row < col, quotient, tl.where(row == col, root, 0.0)))
    inverse = tl.where(row >= col, quotient, 0.0)
    return lower, inverse, pivots


@triton.jit
def _earlier_columns(c_ptr, m, n, columns, N, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Return C[m, :columns] C[n, :columns]ᵀ."""
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = load_tile(c_ptr, m, col, N, N, N)
        y = load_tile(c_ptr, n, col, N, N, N)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit
def _cholesky_kernel(
    k_ptr, shift_ptr, c_ptr, pivot_ptr, N, stride_kl, stride_kn, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Factor one matrix panel by panel; each panel reads the panels to its left from the output."""
    matrix = tl.program_id(0).to(tl.int64)
    k_ptr += matrix * stride_kl
    c_ptr += matrix * N * N
    shift = tl.load(shift_ptr + matrix)
    smallest = float("inf")
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        # The tile comes from the lower triangle alone, as in torch.
        high = tl.maximum(n[:, None], n[None, :])
        low = tl.minimum(n[:, None], n[None, :])
        tile = tl.load(k_ptr + high * stride_kn + low, mask=high < N, other=0.0)
        tile += tl.where(high == low, tl.where(high < N, shift, 1.0), 0.0)
        tile -= _earlier_columns(c_ptr, n, n, first, N, BLOCK, BLOCK)
        lower, inverse, pivots = _eliminate(tile, BLOCK)
        # A minimum would ignore NaN, so every pivot that is not positive counts as −1.
        pivots = tl.where(n < N, tl.where(pivots > 0.0, pivots, -1.0), float("inf"))
        smallest = tl.minimum(smallest, tl.min(pivots, 0))
        tl.store(c_ptr + n[:, None] * N + n[None, :], lower, mask=high < N)
        for below in range(first + BLOCK, N, BLOCK_M):
            m = below + tl.arange(0, BLOCK_M)
            panel = load_tile(k_ptr, m, n, stride_kn, N, N)
            panel -= _earlier_columns(c_ptr, m, n, first, N, BLOCK_M, BLOCK)
            panel = tl.dot(panel, tl.trans(inverse), input_precision="ieee")
            tl.store(c_ptr + m[:, None] * N + n[None, :], panel, mask=(m < N)[:, None])
            tl.store(c_ptr + n[:, None] * N + m[None, :], tl.zeros((BLOCK, BLOCK_M), tl.float32), mask=(m < N)[None, :])
        tl.debug_barrier()  # the next panel reads what other threads have just stored
    tl.store(pivot_ptr + matrix, smallest)


_CHOLESKY = single_config(
    _cholesky_kernel, "*fp32 *fp32 *fp32 *fp32 i32 i32 i32", tiling(BLOCK=TILE, BLOCK_M=64, num_warps=8)
)


def _cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    k_LNN = last_contiguous(k_LNN)
    matrices, n = k_LNN.shape[:2]
    c_LNN = torch.empty(matrices, n, n, dtype=torch.float32, device=k_LNN.device)
    pivot_L = torch.empty(matrices, dtype=torch.float32, device=k_LNN.device)
    _CHOLESKY.launch((matrices,), k_LNN, contiguous(shift_L), c_LNN, pivot_L, n, *k_LNN.stride()[:2])
    return c_LNN, pivot_L


def gram_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor, Tensor]:
    """Return Gram matrices of condition about 10⁴, and shifts of several sizes."""
    j_LNK = normal(matrices, n, 2 * n, dtype=torch.float64, device=device)
    j_LNK *= torch.logspace(0, -2, n, dtype=torch.float64, device=device)[:, None]
    return (j_LNK @ j_LNK.mT).float(), torch.logspace(-2, 0, matrices, device=device)


def batch_examples(make: Callable[[torch.device, int, int], tuple[Any, ...]]) -> dict[str, Example]:
    """Return the examples that every op on several matrices is tried with: two and more diagonal tiles.

    An ill-conditioned solution has little more than one direction, whose rounding is a matter of chance: hence 16.
    """

    def example(matrices: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return make(device, matrices, n)

    return {f"{matrices} of {n}": partial(example, matrices, n) for matrices, n in ((16, 45), (4, 150))}


SPECS = (
    KernelSpec(
        name="cholesky",
        triton_impl=_cholesky,
        torch_impl=cpu.cholesky,
        reference=reference.cholesky,
        examples=batch_examples(gram_example),
        flops=lambda k_LNN, shift_L: k_LNN.numel() * k_LNN.shape[1] // 3,
        bytes=lambda k_LNN, shift_L: 2 * nbytes(k_LNN),
        configs=(_CHOLESKY,),
        dtypes=(torch.float32,),
        mutates=0,
    ),
)
