# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The two products that every step takes with explicit per-sample gradients: project (J v) and expand (Jᵀ w).

Each streams J once, and that is its whole cost: plain sums, no tensor cores, and half-precision J at half the price.

Dimensions: N samples, K entries of a flat gradient, S partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from .spec import (
    TRITON_TYPES,
    Config,
    Constants,
    KernelSpec,
    cdiv,
    contiguous,
    expect,
    nbytes,
    normal,
    rows_contiguous,
    runs_kernel,
    tl,
    triton,
    widen,
)
from .tiles import weighted_rows

_CHUNK = 4096  # columns of J that one program projects: enough programs for any GPU once J is worth the name


@triton_op("tengrad_triton::project_rows", mutates_args=())
def project_rows(j_NK: Tensor, v_K: Tensor) -> Tensor:
    """Return y_N = J v for explicit per-sample gradients."""
    expect("v_K", v_K, j_NK.shape[1])
    return _project_rows(j_NK, v_K) if runs_kernel(j_NK, v_K) else project_rows_reference(j_NK, v_K)


def project_rows_reference(j_NK: Tensor, v_K: Tensor) -> Tensor:
    """y_n = ⟨J_n, v⟩."""
    return widen(j_NK) @ widen(v_K)


@triton.jit
def _project_rows_kernel(
    j_ptr, v_ptr, part_ptr, N, K, stride_jn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """part[chunk, n] = ⟨J_n, v⟩ over a chunk of columns, for BLOCK_N samples."""
    chunk = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j_ptr += rows.to(tl.int64)[:, None] * stride_jn
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, CHUNK, BLOCK_K):
        cols = chunk * CHUNK + start + tl.arange(0, BLOCK_K)
        v = tl.load(v_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        j = tl.load(j_ptr + cols[None, :], mask=(rows < N)[:, None] & (cols < K)[None, :], other=0.0)
        total += j.to(tl.float32) * v[None, :]
    tl.store(part_ptr + chunk * N + rows, tl.sum(total, 1), mask=rows < N)


_PROJECT_ROWS = {
    dtype: Config(
        kernel=_project_rows_kernel,
        types=f"{entries} *fp32 *fp32 i32 i32 i32",
        constants={"BLOCK_N": 8, "BLOCK_K": 512, "CHUNK": _CHUNK},
    )
    for dtype, entries in TRITON_TYPES.items()
}


def _project_rows(j_NK: Tensor, v_K: Tensor) -> Tensor:
    j_NK, v_K = rows_contiguous(j_NK), contiguous(v_K.float())
    n, k = j_NK.shape
    part_SN = torch.empty(cdiv(k, _CHUNK), n, dtype=torch.float32, device=j_NK.device)
    config = _PROJECT_ROWS[j_NK.dtype]
    config.launch((part_SN.shape[0], cdiv(n, config.block("N"))), j_NK, v_K, part_SN, n, k, j_NK.stride(0))
    return part_SN.sum(0)


@triton_op("tengrad_triton::expand_rows", mutates_args=())
def expand_rows(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """Return u_K = Jᵀ w for explicit per-sample gradients."""
    expect("w_N", w_N, j_NK.shape[0])
    return _expand_rows(j_NK, w_N) if runs_kernel(j_NK, w_N) else expand_rows_reference(j_NK, w_N)


def expand_rows_reference(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """U = Σ_n w_n J_n."""
    return widen(w_N) @ widen(j_NK)


@triton.jit
def _expand_rows_kernel(
    j_ptr, w_ptr, u_ptr, N, K, stride_jn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """u[cols] = Σ_n w_n J[n, cols] for BLOCK_K columns."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    expanded = weighted_rows(j_ptr, w_ptr, cols, N, K, stride_jn, BLOCK_N, BLOCK_K)
    tl.store(u_ptr + cols, expanded, mask=cols < K)


EXPAND_ROWS_TILE: Constants = {"BLOCK_N": 8, "BLOCK_K": 512}
_EXPAND_ROWS = {
    dtype: Config(kernel=_expand_rows_kernel, types=f"{entries} *fp32 *fp32 i32 i32 i32", constants=EXPAND_ROWS_TILE)
    for dtype, entries in TRITON_TYPES.items()
}


def _expand_rows(j_NK: Tensor, w_N: Tensor) -> Tensor:
    j_NK, w_N = rows_contiguous(j_NK), contiguous(w_N.float())
    n, k = j_NK.shape
    u_K = torch.empty(k, dtype=torch.float32, device=j_NK.device)
    config = _EXPAND_ROWS[j_NK.dtype]
    config.launch((cdiv(k, config.block("K")),), j_NK, w_N, u_K, n, k, j_NK.stride(0))
    return u_K


def _rows(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    j_NK = normal(150, 4100, dtype=dtype, device=device)
    v_K = normal(4100, dtype=torch.float32, device=device, seed=1)
    return j_NK, v_K, normal(150, dtype=torch.float32, device=device, seed=2)


SPECS = (
    KernelSpec(
        name="project_rows",
        fast=_project_rows,
        reference=project_rows_reference,
        examples={"two chunks": lambda dtype, device: _rows(dtype, device)[:2]},
        flops=lambda j_NK, v_K: 2 * j_NK.numel(),
        bytes=lambda j_NK, v_K: nbytes(j_NK, v_K) + 4 * j_NK.shape[0],
        configs=tuple(_PROJECT_ROWS.values()),
    ),
    KernelSpec(
        name="expand_rows",
        fast=_expand_rows,
        reference=expand_rows_reference,
        examples={"two chunks": lambda dtype, device: _rows(dtype, device)[::2]},
        flops=lambda j_NK, w_N: 2 * j_NK.numel(),
        bytes=lambda j_NK, w_N: nbytes(j_NK, w_N) + 4 * j_NK.shape[1],
        configs=tuple(_EXPAND_ROWS.values()),
    ),
)
