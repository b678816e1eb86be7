# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What follows a batched Cholesky factorization: the inverse of the factor, and solving with it.

Dimensions: L matrices, N rows, T diagonal tiles, B rows of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from .cholesky import TILE, batch_examples, cholesky_torch, gram_example, is_small
from .spec import Config, KernelSpec, cdiv, contiguous, expect, nbytes, normal, rows_contiguous, tl, triton
from .primitives import load_tile


@triton_op("tengrad_triton::cholesky_inverse", mutates_args=())
def cholesky_inverse(c_LNN: Tensor) -> Tensor:
    """Return w_LNN = C⁻¹ of lower factors: two matrix-vector products then replace each pair of triangular solves."""
    return (_cholesky_inverse if is_small(c_LNN, c_LNN) else cholesky_inverse_torch)(c_LNN)


def cholesky_inverse_torch(c_LNN: Tensor) -> Tensor:
    """W = C⁻¹."""
    eye_NN = torch.eye(c_LNN.shape[-1], dtype=c_LNN.dtype, device=c_LNN.device)
    w_LNN: Tensor = torch.linalg.solve_triangular(c_LNN, eye_NN.expand_as(c_LNN), upper=False)
    return w_LNN


@triton.jit
def _invert_tiles_kernel(c_ptr, t_ptr, N, stride_cl, stride_cn, BLOCK: tl.constexpr):
    """Invert one diagonal tile of one matrix by forward substitution."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    tile = load_tile(c_ptr + matrix * stride_cl, rows, rows, stride_cn, N, N)
    tile = tl.where((row == col) & (rows >= N)[:, None], 1.0, tile)
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
    """One block of columns of W, from the top down, reading back the rows that are done."""
    matrix = tl.program_id(0).to(tl.int64)
    c_ptr += matrix * stride_cl
    t_ptr += matrix * tl.num_programs(1) * BLOCK * BLOCK
    w_ptr += matrix * N * N
    first = tl.program_id(1) * BLOCK
    b = tl.arange(0, BLOCK)
    cols = first + b
    for start in range(0, first, BLOCK):
        rows = start + b
        tl.store(
            w_ptr + rows[:, None] * N + cols[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), mask=(cols < N)[None, :]
        )
    for start in range(first, N, BLOCK):
        rows = start + b
        rest = tl.where(rows[:, None] == cols[None, :], 1.0, 0.0)
        for above in range(first, start, BLOCK):
            c = load_tile(c_ptr, rows, above + b, stride_cn, N, N)
            w = load_tile(w_ptr, above + b, cols, N, N, N)
            rest -= tl.dot(c, w, input_precision="ieee")
        tile = tl.load(t_ptr + start * BLOCK + b[:, None] * BLOCK + b[None, :])
        w = tl.dot(tile, rest, input_precision="ieee")
        tl.store(w_ptr + rows[:, None] * N + cols[None, :], w, mask=(rows < N)[:, None] & (cols < N)[None, :])
        tl.debug_barrier()  # the rows below read what other threads have just stored


_INVERT_TILES = Config(kernel=_invert_tiles_kernel, types="*fp32 *fp32 i32 i32 i32", constants={"BLOCK": TILE})
_INVERT = Config(kernel=_invert_kernel, types="*fp32 *fp32 *fp32 i32 i32 i32", constants={"BLOCK": TILE})


def _cholesky_inverse(c_LNN: Tensor) -> Tensor:
    c_LNN = rows_contiguous(c_LNN)
    matrices, n = c_LNN.shape[:2]
    tiles = cdiv(n, TILE)
    t_LTBB = torch.empty(matrices, tiles, TILE, TILE, dtype=torch.float32, device=c_LNN.device)
    w_LNN = torch.empty(matrices, n, n, dtype=torch.float32, device=c_LNN.device)
    _INVERT_TILES.launch((matrices, tiles), c_LNN, t_LTBB, n, *c_LNN.stride()[:2])
    _INVERT.launch((matrices, tiles), c_LNN, t_LTBB, w_LNN, n, *c_LNN.stride()[:2])
    return w_LNN


@triton_op("tengrad_triton::cholesky_solve", mutates_args=())
def cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Return z_LN = (K + shift I)⁻¹ y = Wᵀ (W y)."""
    expect("y_LN", y_LN, *w_LNN.shape[:2])
    return (_cholesky_solve if is_small(w_LNN, y_LN) else cholesky_solve_torch)(w_LNN, y_LN)


def cholesky_solve_torch(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Z = Wᵀ (W y)."""
    return torch.bmm(torch.bmm(y_LN.unsqueeze(1), w_LNN.mT), w_LNN).squeeze(1)


@triton.jit
def _solve_kernel(w_ptr, y_ptr, z_ptr, N, stride_wl, stride_wn, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both products in one pass over W: each block of rows is used as it is and transposed."""
    matrix = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    y = tl.load(y_ptr + matrix * N + cols, mask=cols < N, other=0.0)
    z = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_R):
        w = load_tile(w_ptr + matrix * stride_wl, start + tl.arange(0, BLOCK_R), cols, stride_wn, N, N)
        product = tl.sum(w * y[None, :], 1)
        z += tl.sum(w * product[:, None], 0)
    tl.store(z_ptr + matrix * N + cols, z, mask=cols < N)


_SOLVE = [
    Config(
        kernel=_solve_kernel,
        types="*fp32 *fp32 *fp32 i32 i32 i32",
        constants={"BLOCK_R": rows, "BLOCK_N": columns},
        num_warps=num_warps,
    )
    for rows, columns, num_warps in ((32, 128, 4), (16, 512, 8))
]


def _cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    w_LNN, y_LN = rows_contiguous(w_LNN), contiguous(y_LN)
    matrices, n = y_LN.shape
    z_LN = torch.empty(matrices, n, dtype=torch.float32, device=y_LN.device)
    config = next(config for config in _SOLVE if config.block("N") >= n)
    config.launch((matrices,), w_LNN, y_LN, z_LN, n, *w_LNN.stride()[:2])
    return z_LN


def _factor_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor]:
    return (cholesky_torch(*gram_example(device, matrices, n))[0],)


def _solve_example(device: torch.device, matrices: int, n: int) -> tuple[Tensor, Tensor]:
    w_LNN = cholesky_inverse_torch(*_factor_example(device, matrices, n))
    return w_LNN, normal(matrices, n, dtype=torch.float32, device=device, seed=1)


SPECS = (
    KernelSpec(
        name="cholesky_inverse",
        triton_impl=_cholesky_inverse,
        torch_impl=cholesky_inverse_torch,
        examples=batch_examples(_factor_example),
        flops=lambda c_LNN: c_LNN.numel() * c_LNN.shape[1] // 3,
        bytes=lambda c_LNN: 2 * nbytes(c_LNN),
        configs=(_INVERT_TILES, _INVERT),
        dtypes=(torch.float32,),
    ),
    KernelSpec(
        name="cholesky_solve",
        triton_impl=_cholesky_solve,
        torch_impl=cholesky_solve_torch,
        examples=batch_examples(_solve_example),
        flops=lambda w_LNN, y_LN: 2 * w_LNN.numel(),
        bytes=lambda w_LNN, y_LN: nbytes(w_LNN, y_LN, y_LN),
        configs=tuple(_SOLVE),
        dtypes=(torch.float32,),
    ),
)
