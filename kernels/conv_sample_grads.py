# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Per-sample gradients from the windows of an image, or from a sequence: a matrix product for each tap of the kernel.

Dimensions: N samples, K entries of a flat gradient; what the kernel calls INPUTS and OUTPUTS are those of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import TRITON_TYPES, Config, cdiv, tl, triton


@triton.jit
def _window_grads_kernel(
    x_ptr, g_ptr, j_ptr, INPUTS, OUTPUTS, P, OUT_W, KERNEL_W, step_row, step_col, tap_row, tap_col,
    stride_xn, stride_xg, stride_gn, stride_gg, stride_gp,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_p g[p, o] x[window p, tap, i] for one tile of outputs and inputs, one tap of the kernel, group and sample.

    step_* is how far apart in x the windows of neighbouring positions are, tap_* the entries of one window.
    """
    input_tiles = tl.cdiv(INPUTS, BLOCK_I)
    tiles = input_tiles * tl.cdiv(OUTPUTS, BLOCK_O)
    tap = tl.program_id(0) // tiles
    i = tl.program_id(0) % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(0) % tiles // input_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    group = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    x_ptr += sample * stride_xn + group * stride_xg + tap // KERNEL_W * tap_row + tap % KERNEL_W * tap_col
    g_ptr += sample * stride_gn + group * stride_gg
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        window = p // OUT_W * step_row + p % OUT_W * step_col
        x = tl.load(x_ptr + window[:, None] + i[None, :], mask=(p < P)[:, None] & (i < INPUTS)[None, :], other=0.0)
        g_at = p[:, None] * stride_gp + o[None, :]
        g = tl.load(g_ptr + g_at, mask=(p < P)[:, None] & (o < OUTPUTS)[None, :], other=0.0)
        total = tl.dot(tl.trans(g), x, total, input_precision="ieee")
    row = (sample * tl.num_programs(1) + group) * OUTPUTS + o
    taps = tl.num_programs(0) // tiles
    at = (row * taps + tap)[:, None] * INPUTS + i[None, :]
    inside = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
    tl.store(j_ptr + at, total.to(j_ptr.dtype.element_ty), mask=inside)


# Positions, outputs, inputs, warps and stages, for float32, which no tensor cores multiply, and for half precision.
_TILES = {
    "default": ((32, 64, 64, 4, 3), (64, 64, 64, 4, 3)),
    "wide": ((32, 64, 128, 4, 3), (64, 64, 128, 4, 3)),  # a window's row has several times as many inputs as outputs
    "narrow": ((32, 64, 16, 4, 3), (64, 64, 16, 4, 3)),  # the few channels of a first layer
    "short": ((16, 64, 64, 4, 2), (16, 64, 64, 4, 2)),  # few positions: little padding, and more programs that store
}


def _config(dtype: torch.dtype, name: str, sizes: tuple[int, int, int, int, int]) -> Config:
    *blocks, num_warps, num_stages = sizes
    return Config(
        kernel=_window_grads_kernel,
        types=3 * f"{TRITON_TYPES[dtype]} " + 14 * "i32 ",
        constants=dict(zip(("BLOCK_P", "BLOCK_O", "BLOCK_I"), blocks, strict=True)),
        unaligned=("P", "OUT_W", "KERNEL_W"),
        num_warps=num_warps,
        num_stages=num_stages,
        async_copies=True,
        name=name,
    )


_WINDOW_GRADS = {
    (tile, dtype): _config(dtype, tile, sizes[dtype != torch.float32])
    for tile, sizes in _TILES.items()
    for dtype in TRITON_TYPES
}
_LARGE = {  # the default where there is enough to fill it
    dtype: _config(dtype, "default", (64, 128, 128, 8, 3)) for dtype in TRITON_TYPES if dtype != torch.float32
}
WINDOW_CONFIGS = (*_WINDOW_GRADS.values(), *_LARGE.values())


def window_grads(
    x: Tensor, g: Tensor, taps: int, sizes: tuple[int, ...], strides: tuple[int, ...], config: str
) -> Tensor:
    """Return j_NK from what the kernel calls INPUTS, OUTPUTS, P, OUT_W and KERNEL_W, and all distances in memory."""
    inputs, outputs = sizes[:2]
    groups = g.numel() // (g.shape[0] * outputs * sizes[2])
    j_NK = torch.empty(g.shape[0], groups * outputs * taps * inputs, dtype=x.dtype, device=x.device)
    launch = _WINDOW_GRADS[config, x.dtype]
    if config == "default" and min(inputs, outputs) > launch.block("I"):
        launch = _LARGE.get(x.dtype, launch)
    tiles = cdiv(inputs, launch.block("I")) * cdiv(outputs, launch.block("O"))
    launch.launch((taps * tiles, groups, g.shape[0]), x, g, j_NK, *sizes, *strides)
    return j_NK
