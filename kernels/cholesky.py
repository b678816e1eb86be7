# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Batched Cholesky factorization of small damped Gram matrices.

One program factors one matrix, so a matrix that is not positive definite cannot disturb its neighbours, and a batch
takes as long as one. Above 512 rows, or with one or two matrices of more than 256, torch's own routines are faster.

Dimensions: L matrices, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from .spec import (
    Config,
    Example,
    KernelSpec,
    contiguous,
    expect,
    nbytes,
    normal,
    rows_contiguous,
    runs_kernel,
    tl,
    triton,
)
from .primitives import load_tile

TILE = 32  # rows of a diagonal tile: the chain of dependent columns grows with it, the number of panels shrinks


@triton_op("tengrad_triton::cholesky", mutates_args=())
def cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor K + shift I = C Cᵀ for every matrix; return the lower factors c_LNN and the smallest pivots pivot_L.

    Never synchronizes with the device and never raises for a matrix that is not positive definite: its smallest pivot
    (the square of the smallest diagonal entry of C) is then zero, negative or NaN, and its factor must not be used.
    """
    expect("k_LNN", k_LNN, shift_L.shape[0], k_LNN.shape[1], k_LNN.shape[1])
    return (_cholesky if is_small(k_LNN, shift_L) else cholesky_torch)(k_LNN, shift_L)


def cholesky_torch(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """C = chol(K + shift I)."""
    damped_LNN = k_LNN.clone()
    damped_LNN.diagonal(dim1=-2, dim2=-1).add_(shift_L.unsqueeze(1))
    c_LNN, info_L = torch.linalg.cholesky_ex(damped_LNN, check_errors=False)
    pivot_L = c_LNN.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    return c_LNN, torch.where(info_L == 0, pivot_L, -torch.ones_like(pivot_L))


def is_small(x_LNN: Tensor, vector: Tensor) -> bool:
    """Whether a kernel does better than torch on these matrices and what comes with them: many of them, or small."""
    matrices, n = x_LNN.shape[:2]
    exact = x_LNN.dtype == vector.dtype == torch.float32
    return exact and runs_kernel(x_LNN, vector) and n <= (512 if matrices > 2 else 256)


@triton.jit
def _add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def _eliminate(tile, BLOCK: tl.constexpr):
    """Return the lower factor of a symmetric tile, its inverse, and its pivots.

    LDLᵀ, so that no square root stands in the chain of columns. What is eliminated is summed up first and subtracted
    at once, and quotients and roots are correctly rounded: the error would be twice that of torch otherwise. Rows below
    the diagonal of `packed` hold the inverse of the unit lower factor in the columns that are done with, rows above it
    the upper factor times D.
    """
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    eliminated = tl.zeros((BLOCK, BLOCK), tl.float32)
    for j in range(BLOCK):
        packed = tile - eliminated
        below = tl.sum(tl.where(col == j, packed, 0.0), 1)[:, None]
        everywhere = tl.broadcast_to(below, (BLOCK, BLOCK))
        # One reduction carries both the pivot's row and the pivot to every column.
        across, pivot = tl.reduce((tl.where(row == j, packed, 0.0), tl.where(row == j, everywhere, 0.0)), 0, _add_pair)
        scaled = tl.div_rn(tl.where(col == j, 1.0, across[None, :]), pivot[None, :])
        # Where the column falls to zero, the inverse begins.
        begins = (row > j) & (col == j)
        tile = tl.where(begins, 0.0, tile)
        eliminated = tl.where(begins, 0.0, eliminated) + tl.where(row > j, below, 0.0) * scaled
    packed = tile - eliminated
    pivots = tl.sum(tl.where(row == col, packed, 0.0), 1)
    root = tl.sqrt_rn(pivots)[:, None]
    lower = tl.trans(tl.div_rn(tl.where(row <= col, packed, 0.0), root))
    inverse = tl.div_rn(tl.where(row > col, packed, tl.where(row == col, 1.0, 0.0)), root)
    return lower, inverse, pivots


@triton.jit
def _earlier_columns(c_ptr, m, rows, columns, N, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """C[m, :columns] C[rows, :columns]ᵀ."""
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = load_tile(c_ptr, m, cols, N, N, N)
        y = load_tile(c_ptr, rows, cols, N, N, N)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit
def _cholesky_kernel(
    k_ptr, shift_ptr, c_ptr, pivot_ptr, N, stride_kl, stride_kn, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Factor one matrix panel by panel, each from the panels to its left, which are read back from the output."""
    matrix = tl.program_id(0).to(tl.int64)
    k_ptr += matrix * stride_kl
    c_ptr += matrix * N * N
    shift = tl.load(shift_ptr + matrix)
    smallest = float("inf")
    for first in range(0, N, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        # Both triangles of the tile come from the lower one, as in torch.
        high = tl.maximum(rows[:, None], rows[None, :])
        low = tl.minimum(rows[:, None], rows[None, :])
        tile = tl.load(k_ptr + high * stride_kn + low, mask=high < N, other=0.0)
        tile += tl.where(high == low, tl.where(high < N, shift, 1.0), 0.0)
        tile -= _earlier_columns(c_ptr, rows, rows, first, N, BLOCK, BLOCK)
        lower, inverse, pivots = _eliminate(tile, BLOCK)
        # A minimum would ignore NaN; whatever is not positive counts as −1.
        pivots = tl.where(rows < N, tl.where(pivots > 0.0, pivots, -1.0), float("inf"))
        smallest = tl.minimum(smallest, tl.min(pivots, 0))
        tl.store(c_ptr + rows[:, None] * N + rows[None, :], lower, mask=high < N)
        for below in range(first + BLOCK, N, BLOCK_M):
            m = below + tl.arange(0, BLOCK_M)
            panel = load_tile(k_ptr, m, rows, stride_kn, N, N)
            panel -= _earlier_columns(c_ptr, m, rows, first, N, BLOCK_M, BLOCK)
            panel = tl.dot(panel, tl.trans(inverse), input_precision="ieee")
            tl.store(c_ptr + m[:, None] * N + rows[None, :], panel, mask=(m < N)[:, None])
            tl.store(
                c_ptr + rows[:, None] * N + m[None, :], tl.zeros((BLOCK, BLOCK_M), tl.float32), mask=(m < N)[None, :]
            )
        tl.debug_barrier()  # the next panel reads what other threads have just stored
    tl.store(pivot_ptr + matrix, smallest)


_CHOLESKY = Config(
    kernel=_cholesky_kernel,
    types="*fp32 *fp32 *fp32 *fp32 i32 i32 i32",
    constants={"BLOCK": TILE, "BLOCK_M": 64},
    num_warps=8,
)


def _cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    k_LNN = rows_contiguous(k_LNN)
    matrices, n = k_LNN.shape[:2]
    c_LNN = torch.empty(matrices, n, n, dtype=torch.float32, device=k_LNN.device)
    pivot_L = torch.empty(matrices, dtype=torch.float32, device=k_LNN.device)
    _CHOLESKY.launch((matrices,), k_LNN, contiguous(shift_L), c_LNN, pivot_L, n, *k_LNN.stride()[:2])
    return c_LNN, pivot_L


def gram_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor, Tensor]:
    """Gram matrices of condition about 10⁴ and what makes each of them better conditioned by another factor."""
    j_LNK = normal(matrices, n, 2 * n, dtype=torch.float64, device=device)
    j_LNK *= torch.logspace(0, -2, n, dtype=torch.float64, device=device)[:, None]
    return (j_LNK @ j_LNK.mT).float(), torch.logspace(-2, 0, matrices, device=device)


def batch_examples(make: Callable[[torch.device, int, int], tuple[Any, ...]]) -> dict[str, Example]:
    """Return the cases that every op on a batch of matrices is tried with: one and several diagonal tiles."""

    def example(matrices: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return make(device, matrices, n)

    return {f"{matrices} of {n}": partial(example, matrices, n) for matrices, n in ((2, 45), (1, 150))}


SPECS = (
    KernelSpec(
        name="cholesky",
        triton_impl=_cholesky,
        torch_impl=cholesky_torch,
        examples=batch_examples(gram_example),
        flops=lambda k_LNN, shift_L: k_LNN.numel() * k_LNN.shape[1] // 3,
        bytes=lambda k_LNN, shift_L: 2 * nbytes(k_LNN),
        configs=(_CHOLESKY,),
        dtypes=(torch.float32,),
    ),
)
