# ruff: noqa: ANN001, ANN201  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Device functions that several kernels share."""

from __future__ import annotations

from .spec import tl, triton


@triton.jit
def load_tile(ptr, rows, cols, stride_row, n_rows, n_cols):
    """Entries [rows, cols] of a matrix with contiguous rows, zero outside of it."""
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride_row + cols[None, :], mask=inside, other=0.0)


@triton.jit
def weighted_outer(
    a_ptr, g_ptr, w_ptr, group, o, i, N, P, INPUTS, OUTPUTS,
    stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_np w_n g_np[o] a_np[i] of one group."""
    a_ptr += group * stride_ag
    g_ptr += group * stride_gg
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, N * P, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inside = (rows < N * P)[:, None]
        n = (rows // P).to(tl.int64)
        p = rows % P
        a_at = (n * stride_an + p * stride_ap)[:, None] + i[None, :]
        g_at = (n * stride_gn + p * stride_gp)[:, None] + o[None, :]
        a = tl.load(a_ptr + a_at, mask=inside & (i < INPUTS)[None, :], other=0.0)
        g = tl.load(g_ptr + g_at, mask=inside & (o < OUTPUTS)[None, :], other=0.0)
        w = tl.load(w_ptr + n, mask=rows < N * P, other=0.0)
        total = tl.dot(tl.trans(g * w[:, None]), a, total, input_precision="ieee")
    return total


@triton.jit
def weighted_rows(j_ptr, w_ptr, cols, N, K, stride_jn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ_n w_n J[n, cols]."""
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        w = tl.load(w_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
        at = rows.to(tl.int64)[:, None] * stride_jn + cols[None, :]
        j = tl.load(j_ptr + at, mask=(rows < N)[:, None] & (cols < K)[None, :], other=0.0)
        total += j.to(tl.float32) * w[:, None]
    return tl.sum(total, 0)


@triton.jit
def update_entries(
    param_ptr, momentum_ptr, grad_ptr, param_at, momentum_at, grad_at, inside, expanded, damping_ptr, settings_ptr,
    NESTEROV: tl.constexpr,
):  # fmt: skip
    """The update rule of `update_` along (grad − expanded) / damping, on the entries at some offsets."""
    lr = tl.load(settings_ptr)
    momentum = tl.load(settings_ptr + 1)
    weight_decay = tl.load(settings_ptr + 2)
    shrink = tl.load(settings_ptr + 3)
    param = tl.load(param_ptr + param_at, mask=inside, other=0.0).to(tl.float32)
    buffer = tl.load(momentum_ptr + momentum_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
    decayed = tl.div_rn(grad - expanded, tl.load(damping_ptr)) + weight_decay * param
    buffer = momentum * buffer + decayed
    step = decayed + momentum * buffer if NESTEROV else buffer
    param = (1 - lr * shrink) * param - lr * step
    tl.store(momentum_ptr + momentum_at, buffer.to(momentum_ptr.dtype.element_ty), mask=inside)
    tl.store(param_ptr + param_at, param.to(param_ptr.dtype.element_ty), mask=inside)
