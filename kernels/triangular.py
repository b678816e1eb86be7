# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The inverse of batched Cholesky factors, and the solution of linear systems with it.

Dimensions: L matrices of size N × N, T diagonal tiles of size B × B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference
from .cholesky import TILE, batch_examples, gram_example, is_small
from .dispatch import contiguous, define_op, expect, last_contiguous
from .primitives import load_tile
from .spec import KernelSpec, cdiv, nbytes, normal, single_config, tiling, tl, triton


@define_op()
def cholesky_inverse(c_LNN: Tensor) -> Tensor:
    """Return w_LNN = C⁻¹; with it `cholesky_solve` is two matrix-vector products (M5).

    Args:
        c_LNN: lower factors, as from `cholesky`; the entries above their diagonals are not used.

    Returns:
        w_LNN, lower matrices in the dtype of ``c_LNN``.
    """
    return (_cholesky_inverse if is_small(c_LNN, c_LNN) else cpu.cholesky_inverse)(c_LNN)


@triton.jit
def _invert_tiles_kernel(c_ptr, t_ptr, N, stride_cl, stride_cn, BLOCK: tl.constexpr):
    """Invert one diagonal tile of one matrix by forward substitution."""
    matrix = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    tile = load_tile(c_ptr + matrix * stride_cl, n, n, stride_cn, N, N)
    tile = tl.where((row == col) & (n >= N)[:, None], 1.0, tile)
    inverse = tl.where(row == col, 1.0, 0.0)
    for j in range(BLOCK):
        below = tl.sum(tl.where(col == j, tile, 0.0), 1)[:, None]
        diagonal = tl.sum(tl.where(row == j, tl.broadcast_to(below, (BLOCK, BLOCK)), 0.0), 0)
        solved = tl.div_rn(tl.sum(tl.where(row == j, inverse, 0.0), 0), diagonal)[None, :]
        inverse = tl.where(row == j, solved, inverse - tl.where(row > j, below, 0.0) * solved)
    at = (matrix * tl.num_programs(1) + tl.program_id(1)) * BLOCK * BLOCK
    tl.store(t_ptr + at + row * BLOCK + col, inverse)


@triton.jit
def _invert_kernel(c_ptr, t_ptr, w_ptr, N, stride_cl, stride_cn, BLOCK: tl.constexpr):
    """Compute one tile of columns of W from top to bottom; each tile reads the ones above it from the output."""
    matrix = tl.program_id(0).to(tl.int64)
    c_ptr += matrix * stride_cl
    t_ptr += matrix * tl.num_programs(1) * BLOCK * BLOCK
    w_ptr += matrix * N * N
    first = tl.program_id(1) * BLOCK
    b = tl.arange(0, BLOCK)
    m = first + b
    for start in range(0, first, BLOCK):
        n = start + b
        tl.store(w_ptr + n[:, None] * N + m[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), mask=(m < N)[None, :])
    for start in range(first, N, BLOCK):
        n = start + b
        rest = tl.where(n[:, None] == m[None, :], 1.0, 0.0)
        for above in range(first, start, BLOCK):
            c = load_tile(c_ptr, n, above + b, stride_cn, N, N)
            w = load_tile(w_ptr, above + b, m, N, N, N)
            rest -= tl.dot(c, w, input_precision="ieee")
        tile = tl.load(t_ptr + start * BLOCK + b[:, None] * BLOCK + b[None, :])
        w = tl.dot(tile, rest, input_precision="ieee")
        tl.store(w_ptr + n[:, None] * N + m[None, :], w, mask=(n < N)[:, None] & (m < N)[None, :])
        tl.debug_barrier()  # the tiles below read what other threads have just stored


_INVERT_TILES = single_config(_invert_tiles_kernel, "*fp32 *fp32 i32 i32 i32", tiling(BLOCK=TILE))
_INVERT = single_config(_invert_kernel, "*fp32 *fp32 *fp32 i32 i32 i32", tiling(BLOCK=TILE))


def _cholesky_inverse(c_LNN: Tensor) -> Tensor:
    c_LNN = last_contiguous(c_LNN)
    matrices, n = c_LNN.shape[:2]
    tiles = cdiv(n, TILE)
    t_LTBB = torch.empty(matrices, tiles, TILE, TILE, dtype=torch.float32, device=c_LNN.device)
    w_LNN = torch.empty(matrices, n, n, dtype=torch.float32, device=c_LNN.device)
    _INVERT_TILES.launch((matrices, tiles), c_LNN, t_LTBB, n, *c_LNN.stride()[:2])
    _INVERT.launch((matrices, tiles), c_LNN, t_LTBB, w_LNN, n, *c_LNN.stride()[:2])
    return w_LNN


@define_op()
def cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Return z_LN = (K + shift I)⁻¹ y = Wᵀ (W y) (M5).

    Args:
        w_LNN: inverse factors, as from `cholesky_inverse`.
        y_LN: a right-hand side for each matrix.

    Returns:
        z_LN, in the dtype of ``w_LNN``.

    Raises:
        ValueError: y_LN does not have one vector of N entries for each matrix.
    """
    expect("y_LN", y_LN, *w_LNN.shape[:2])
    return (_cholesky_solve if is_small(w_LNN, y_LN) else cpu.cholesky_solve)(w_LNN, y_LN)


@triton.jit
def _solve_kernel(w_ptr, y_ptr, z_ptr, N, stride_wl, stride_wn, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute z = Wᵀ (W y) in one pass over W: every tile that is read is used in both products."""
    matrix = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    y = tl.load(y_ptr + matrix * N + cols, mask=cols < N, other=0.0)
    z = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_R):
        w = load_tile(w_ptr + matrix * stride_wl, start + tl.arange(0, BLOCK_R), cols, stride_wn, N, N)
        product = tl.sum(w * y[None, :], 1)
        z += tl.sum(w * product[:, None], 0)
    tl.store(z_ptr + matrix * N + cols, z, mask=cols < N)


# A configuration is for matrices whose size N is at most its key.
_SOLVE = {
    most: single_config(_solve_kernel, "*fp32 *fp32 *fp32 i32 i32 i32", chosen)
    for most, chosen in (
        (128, tiling(BLOCK_R=32, BLOCK_N=128, num_warps=4)),
        (512, tiling(BLOCK_R=16, BLOCK_N=512, num_warps=8)),
    )
}


def _cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    w_LNN, y_LN = last_contiguous(w_LNN), contiguous(y_LN)
    matrices, n = y_LN.shape
    z_LN = torch.empty(matrices, n, dtype=torch.float32, device=y_LN.device)
    config = next(config for most, config in _SOLVE.items() if n <= most)
    config.launch((matrices,), w_LNN, y_LN, z_LN, n, *w_LNN.stride()[:2])
    return z_LN


def _factor_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor]:
    return (cpu.cholesky(*gram_example(device, matrices, n))[0],)


def _solve_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor, Tensor]:
    w_LNN = cpu.cholesky_inverse(*_factor_example(device, matrices, n))
    return w_LNN, normal(matrices, n, dtype=torch.float32, device=device, seed=1)


SPECS = (
    KernelSpec(
        name="cholesky_inverse",
        triton_impl=_cholesky_inverse,
        torch_impl=cpu.cholesky_inverse,
        reference=reference.cholesky_inverse,
        examples=batch_examples(_factor_example),
        flops=lambda c_LNN: c_LNN.numel() * c_LNN.shape[1] // 3,
        bytes=lambda c_LNN: 2 * nbytes(c_LNN),
        configs=(_INVERT_TILES, _INVERT),
        dtypes=(torch.float32,),
        mutates=0,
    ),
    KernelSpec(
        name="cholesky_solve",
        triton_impl=_cholesky_solve,
        torch_impl=cpu.cholesky_solve,
        reference=reference.cholesky_solve,
        examples=batch_examples(_solve_example),
        flops=lambda w_LNN, y_LN: 2 * w_LNN.numel(),
        bytes=lambda w_LNN, y_LN: nbytes(w_LNN, y_LN, y_LN),
        configs=tuple(_SOLVE.values()),
        dtypes=(torch.float32,),
        mutates=0,
    ),
)
