# ruff: noqa: ANN001, ANN201  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Device functions that several kernels share.

Dimensions: N samples, P positions, R pairs of a sample and a position, K entries of a flat gradient.
"""

from __future__ import annotations

from .spec import tl, triton


@triton.jit
def load_tile(ptr, row, col, stride_row, ROWS, COLS):
    """Load the entries [row, col] of a matrix whose columns are adjacent in memory; zero outside of it."""
    inside = (row < ROWS)[:, None] & (col < COLS)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride_row + col[None, :], mask=inside, other=0.0)


@triton.jit
def add_product(total, x, y, PRECISION: tl.constexpr):
    """Return total + x y, for factors in float32 with the sums over a tile added up apart, as BLAS does for long sums.

    One sum through all tiles has up to four times the error. For half precision the factors' rounding is larger still.
    """
    if x.dtype != tl.float32:
        return tl.dot(x, y, total, input_precision=PRECISION)
    # The last argument, which only concerns 8-bit factors, keeps Triton from adding to `total` entry by entry.
    return total + tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=x.shape[1])


@triton.jit
def add_exactly(total, rest, term):
    """Return the rounded sum total + term, and rest plus the error of that rounding (Knuth's two-sum)."""
    added = total + term
    of_term = added - total
    return added, rest + ((total - (added - of_term)) + (term - of_term))


@triton.jit
def weighted_outer(
    a_ptr, g_ptr, w_ptr, group, o, i, N, P, INPUTS, OUTPUTS,
    stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Return Σ_np w_n g_np[o] a_np[i] of one group."""
    a_ptr += group * stride_ag
    g_ptr += group * stride_gg
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, N * P, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < N * P)[:, None]
        n = (r // P).to(tl.int64)
        p = r % P
        a_at = (n * stride_an + p * stride_ap)[:, None] + i[None, :]
        g_at = (n * stride_gn + p * stride_gp)[:, None] + o[None, :]
        a = tl.load(a_ptr + a_at, mask=inside & (i < INPUTS)[None, :], other=0.0)
        g = tl.load(g_ptr + g_at, mask=inside & (o < OUTPUTS)[None, :], other=0.0)
        w = tl.load(w_ptr + n, mask=r < N * P, other=0.0)
        total = add_product(total, tl.trans(g * w[:, None]), a, PRECISION)
    return total


@triton.jit
def weighted_rows(j_ptr, w_ptr, col, N, K, stride_jn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return Σ_n w_n J[n, col]."""
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        w = tl.load(w_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        at = n.to(tl.int64)[:, None] * stride_jn + col[None, :]
        j = tl.load(j_ptr + at, mask=(n < N)[:, None] & (col < K)[None, :], other=0.0)
        total += j.to(tl.float32) * w[:, None]
    return tl.sum(total, 0)


@triton.jit
def output_tap_input(col, TAPS, INPUTS):
    """Return the indices [o, t, i] of a column of J in a parameter's view [O, T, I]."""
    row_of_inputs = col // INPUTS
    o = row_of_inputs // TAPS
    # Two divisions are enough: with the instructions of four, Triton 3.6 spills.
    return o, row_of_inputs - o * TAPS, col - row_of_inputs * INPUTS


@triton.jit
def update_entries(
    param_ptr, momentum_ptr, grad_ptr, param_at, momentum_at, grad_at, inside, expanded, damping_ptr, settings_ptr,
    NESTEROV: tl.constexpr,
):  # fmt: skip
    """Apply `update_` with the direction (grad − expanded) / damping to the entries at the given offsets."""
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
