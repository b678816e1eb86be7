# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rows of J of depthwise convolutions, for `conv_sample_grads`.

A depthwise convolution has no matrix product: each entry of J_n is a sum over positions, and memory traffic bounds its
time.

Dimensions: N samples, C channels, O outputs, H and W pixels, K entries of a flat gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import TRITON_TYPES, all_configs, cdiv, config_named, configs_of, tiling, tl, triton


@triton.jit
def _depthwise_grads_kernel(
    x_ptr, g_ptr, j_ptr, OUTPUTS, MULTIPLIER, TAPS, P, OUT_W, KERNEL_W, step_row, step_col, tap_row, tap_col,
    stride_xn, stride_gn, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Σ_p g[p, o] x[patch p, tap, channel of o] for BLOCK_T taps and BLOCK_O outputs of one sample."""
    output_tiles = tl.cdiv(OUTPUTS, BLOCK_O)
    o = tl.program_id(0) % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = tl.program_id(0) // output_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample * stride_xn + (tap // KERNEL_W * tap_row + tap % KERNEL_W * tap_col)[None, :, None]
    x_ptr += (o // MULTIPLIER)[None, None, :]
    g_ptr += sample * stride_gn
    wanted = ((tap < TAPS)[:, None] & (o < OUTPUTS)[None, :])[None, :, :]
    total = tl.zeros((BLOCK_P, BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        patch = p // OUT_W * step_row + p % OUT_W * step_col
        x = tl.load(x_ptr + patch[:, None, None], mask=(p < P)[:, None, None] & wanted, other=0.0)
        g_at = p[:, None] * OUTPUTS + o[None, :]
        g = tl.load(g_ptr + g_at, mask=(p < P)[:, None] & (o < OUTPUTS)[None, :], other=0.0)
        total += x.to(tl.float32) * g.to(tl.float32)[:, None, :]
    at = (sample * OUTPUTS + o)[None, :] * TAPS + tap[:, None]
    inside = (tap < TAPS)[:, None] & (o < OUTPUTS)[None, :]
    tl.store(j_ptr + at, tl.sum(total, 0), mask=inside)


_TILINGS = {
    "default": tiling(BLOCK_P=8, BLOCK_T=16, BLOCK_O=32),
    "wide": tiling(BLOCK_P=8, BLOCK_T=16, BLOCK_O=64, num_warps=8),  # reads 128 bytes at once in half precision
    "narrow": tiling(BLOCK_P=16, BLOCK_T=16, BLOCK_O=16),  # for few channels
    "short": tiling(BLOCK_P=4, BLOCK_T=16, BLOCK_O=32),  # for few positions: fewer registers, so more programs
}
_CONFIGS = {
    dtype: configs_of(
        _TILINGS,
        _depthwise_grads_kernel,
        2 * f"{entries} " + "*fp32 " + 12 * "i32 ",
        unaligned=("MULTIPLIER", "TAPS", "P", "OUT_W", "KERNEL_W"),
    )
    for dtype, entries in TRITON_TYPES.items()
}
DEPTHWISE_CONFIGS = all_configs(_CONFIGS)


def launch_depthwise_grads(
    x_NHWC: Tensor, g_NHWO: Tensor, kernel_size: list[int], steps: tuple[int, ...], config: str
) -> Tensor:
    """Return j_NK; ``steps`` are the distances in x between patches, then between their entries, each (row, column)."""
    n, height, width, outputs = g_NHWO.shape
    taps = kernel_size[0] * kernel_size[1]
    chosen = config_named(_CONFIGS[x_NHWC.dtype], config)
    j_NK = torch.empty(n, outputs * taps, dtype=torch.float32, device=x_NHWC.device)
    sizes = (outputs, outputs // x_NHWC.shape[3], taps, height * width, width, kernel_size[1])
    grid = (cdiv(outputs, chosen.block("O")) * cdiv(taps, chosen.block("T")), n)
    chosen.launch(grid, x_NHWC, g_NHWO, j_NK, *sizes, *steps, x_NHWC.stride(0), g_NHWO.stride(0))
    return j_NK
