# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rows J_n of convolutions: one matrix product for each sample and each tap of the convolution's kernel.

A patch is the part of the input that one output position multiplies; a tap is one pixel of the convolution's kernel.
The Triton kernel reads patches directly from a channels-last input.

Dimensions: N samples, C channels, O outputs, H and W pixels, K entries of a flat gradient. In the kernel INPUTS and
OUTPUTS are those of a group, and P are positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu_conv, reference
from .conv_geometry import unpadded
from .depthwise_sample_grads import DEPTHWISE_CONFIGS, launch_depthwise_grads
from .dispatch import contiguous, define_op, dispatch, expect
from .spec import (
    FLOATING,
    TRITON_TYPES,
    Config,
    KernelSpec,
    Tiling,
    all_configs,
    cdiv,
    config_named,
    configs_of,
    in_tf32x3,
    nbytes,
    normal,
    tiling,
    tl,
    triton,
)


@define_op()
def conv_sample_grads(
    x_NCHW: Tensor,
    g_NOHW: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    config: str = "default",
) -> Tensor:
    """Return the rows j_NK of a convolution's J, K running over (O, kh, kw, C / groups) (equation 8; M1).

    The input channel comes last, so that reads and writes of one sample's row are contiguous. If the output has few
    positions in relation to the channels, keep the input and the output gradients instead (see `project_conv`).

    Args:
        x_NCHW: the input, already padded; it is copied unless it is channels-last.
        g_NOHW: the output gradients, converted to the dtype of ``x_NCHW``; they are copied unless channels-last.
        kernel_size: the height and width of the convolution's kernel, in pixels.
        stride: the convolution's stride, (vertical, horizontal).
        dilation: the convolution's dilation, (vertical, horizontal).
        groups: the number of the convolution's groups.
        config: the launch configuration of the kernel.

    Returns:
        j_NK, in the dtype of ``x_NCHW``, but in float32 for half precision.

    Raises:
        ValueError: the numbers of samples differ, the input has too few pixels for the output, or there is no such
            launch configuration.
    """
    expect("g_NOHW", g_NOHW, x_NCHW.shape[0], *g_NOHW.shape[1:])
    axes = zip(x_NCHW.shape[2:], g_NOHW.shape[2:], kernel_size, stride, dilation, strict=True)
    for pixels, outputs, size, step, gap in axes:
        needed = (outputs - 1) * step + (size - 1) * gap + 1
        if pixels < needed:
            raise ValueError(f"{outputs} outputs need a padded input of {needed} pixels or more, got {pixels}")
    arguments = (x_NCHW, g_NOHW, kernel_size, stride, dilation, groups)
    return dispatch(_conv_sample_grads, cpu_conv.conv_sample_grads, PATCH_CONFIGS, config, *arguments)


@triton.jit
def _patch_grads_kernel(
    x_ptr, g_ptr, j_ptr, INPUTS, OUTPUTS, P, OUT_W, KERNEL_W, step_row, step_col, tap_row, tap_col,
    stride_xn, stride_xg, stride_gn, stride_gg, stride_gp,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_p g[p, o] x[patch p, tap, i] for one tile of outputs and inputs, one tap of the kernel, group and sample.

    step_* are the distances in x between the patches of neighbouring positions, tap_* those between entries of a patch.
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
        patch = p // OUT_W * step_row + p % OUT_W * step_col
        x = tl.load(x_ptr + patch[:, None] + i[None, :], mask=(p < P)[:, None] & (i < INPUTS)[None, :], other=0.0)
        g_at = p[:, None] * stride_gp + o[None, :]
        g = tl.load(g_ptr + g_at, mask=(p < P)[:, None] & (o < OUTPUTS)[None, :], other=0.0)
        total = tl.dot(tl.trans(g), x, total, input_precision=PRECISION)
    output = (sample * tl.num_programs(1) + group) * OUTPUTS + o
    taps = tl.num_programs(0) // tiles
    at = (output * taps + tap)[:, None] * INPUTS + i[None, :]
    inside = (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :]
    tl.store(j_ptr + at, total, mask=inside)


# Tensor cores do not multiply float32, so it has other tiles than half precision.
_FLOAT32 = {
    "default": tiling(BLOCK_P=32, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=3),
    # For many more inputs than outputs. With twice the positions in a step, Triton 3.8 and 3.9 spill on sm_80.
    "wide": tiling(BLOCK_P=16, BLOCK_O=64, BLOCK_I=128, num_warps=4, num_stages=4),
    "narrow": tiling(BLOCK_P=32, BLOCK_O=64, BLOCK_I=16, num_warps=4, num_stages=3),  # for the few channels of an image
    "short": tiling(BLOCK_P=16, BLOCK_O=64, BLOCK_I=64, num_warps=4, num_stages=2),  # for few positions
    **in_tf32x3(BLOCK_P=32, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
}
_HALF = {
    "default": tiling(BLOCK_P=64, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
    "wide": tiling(BLOCK_P=64, BLOCK_O=64, BLOCK_I=128, num_warps=4, num_stages=3),
    "narrow": tiling(BLOCK_P=64, BLOCK_O=64, BLOCK_I=16, num_warps=4, num_stages=3),
    "short": tiling(BLOCK_P=32, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=2),
}
# In half precision this is the default for layers with more inputs and outputs than the tile above.
_HALF_LARGE = {"default": tiling(BLOCK_P=64, BLOCK_O=128, BLOCK_I=128, num_warps=8, num_stages=3)}


def _configs(tilings: Mapping[str, Tiling], entries: str) -> dict[str, Config]:
    return configs_of(
        tilings,
        _patch_grads_kernel,
        2 * f"{entries} " + "*fp32 " + 14 * "i32 ",
        constants={"PRECISION": "ieee"},
        unaligned=("P", "OUT_W", "KERNEL_W"),
        async_copies=True,
    )


_CONFIGS = {
    dtype: _configs(_FLOAT32 if dtype == torch.float32 else _HALF, entries) for dtype, entries in TRITON_TYPES.items()
}
_LARGE_CONFIGS = {
    dtype: _configs(_HALF_LARGE, entries) for dtype, entries in TRITON_TYPES.items() if dtype != torch.float32
}
PATCH_CONFIGS = all_configs(_CONFIGS, _LARGE_CONFIGS)


def launch_patch_grads(
    x: Tensor, g: Tensor, taps: int, sizes: tuple[int, ...], distances: tuple[int, ...], config: str
) -> Tensor:
    """Return j_NK.

    Args:
        x: the input, with contiguous channels.
        g: the output gradients, with contiguous outputs.
        taps: the number of taps.
        sizes: the kernel's arguments (INPUTS, OUTPUTS, P, OUT_W, KERNEL_W).
        distances: the kernel's arguments from step_row to stride_gp, in their order.
        config: the name of the launch configuration.
    """
    inputs, outputs = sizes[:2]
    groups = g.numel() // (g.shape[0] * outputs * sizes[2])
    j_NK = torch.empty(g.shape[0], groups * outputs * taps * inputs, dtype=torch.float32, device=x.device)
    chosen = config_named(_CONFIGS[x.dtype], config)
    if chosen.name == "default" and x.dtype in _LARGE_CONFIGS and min(inputs, outputs) > chosen.block("I"):
        chosen = _LARGE_CONFIGS[x.dtype]["default"]
    tiles = cdiv(inputs, chosen.block("I")) * cdiv(outputs, chosen.block("O"))
    chosen.launch((taps * tiles, groups, g.shape[0]), x, g, j_NK, *sizes, *distances)
    return j_NK


def _conv_sample_grads(
    x_NCHW: Tensor,
    g_NOHW: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    config: str = "default",
) -> Tensor:
    x_NHWC = contiguous(x_NCHW.permute(0, 2, 3, 1))
    g_NHWO = contiguous(g_NOHW.to(x_NCHW.dtype).permute(0, 2, 3, 1))
    per_sample, per_row, per_pixel = x_NHWC.stride()[:3]
    _, height, width, outputs = g_NHWO.shape
    steps = (stride[0] * per_row, stride[1] * per_pixel, dilation[0] * per_row, dilation[1] * per_pixel)
    if groups == per_pixel:
        return launch_depthwise_grads(x_NHWC, g_NHWO, kernel_size, steps, config)
    taps_down, taps_across, inputs = *kernel_size, per_pixel // groups
    if groups == 1 and dilation[1] == 1:
        # Horizontally neighbouring taps are adjacent in memory. As one tap with more inputs they fill a tile.
        taps_across, inputs = 1, taps_across * inputs
    sizes = (inputs, outputs // groups, height * width, width, taps_across)
    distances = (*steps, per_sample, per_pixel // groups, g_NHWO.stride(0), outputs // groups, outputs)
    return launch_patch_grads(x_NHWC, g_NHWO, taps_down * taps_across, sizes, distances, config)


def conv_example(
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, ...]:
    """Return arguments of `conv_sample_grads` for an input of this shape; no patch need cover its last pixels."""
    pixels = unpadded(stride, dilation, groups).pixels(shape[2:], kernel_size)
    x_NCHW = normal(*shape, dtype=dtype, device=device)
    g_NOHW = normal(shape[0], outputs, *pixels, dtype=dtype, device=device, seed=1)
    return x_NCHW, g_NOHW, kernel_size, stride, dilation, groups


def _flops(x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], *rest: Any) -> int:
    return 2 * g_NOHW.numel() * x_NCHW.shape[1] // rest[-1] * kernel_size[0] * kernel_size[1]


def _bytes(x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], *rest: Any) -> int:
    written = x_NCHW.shape[0] * g_NOHW.shape[1] * x_NCHW.shape[1] // rest[-1] * kernel_size[0] * kernel_size[1]
    return nbytes(x_NCHW, g_NOHW) + 4 * written


SPECS = (
    KernelSpec(
        name="conv_sample_grads",
        triton_impl=_conv_sample_grads,
        torch_impl=cpu_conv.conv_sample_grads,
        reference=reference.conv_sample_grads,
        examples={
            "merged taps": partial(conv_example, (3, 5, 11, 13), 7, [3, 2], [2, 1], [1, 1], 1),
            "dilated": partial(conv_example, (2, 20, 11, 12), 9, [2, 3], [1, 2], [2, 3], 1),
            "groups": partial(conv_example, (2, 10, 9, 8), 6, [3, 3], [1, 1], [1, 1], 2),
            "large tiles": partial(conv_example, (2, 70, 5, 6), 70, [3, 3], [1, 1], [1, 1], 1),
            "depthwise": partial(conv_example, (2, 35, 9, 8), 35, [3, 3], [2, 1], [1, 1], 35),
            "channel multiplier": partial(conv_example, (2, 5, 9, 12), 10, [5, 5], [1, 1], [1, 2], 5),
        },
        flops=_flops,
        bytes=_bytes,
        configs=(*PATCH_CONFIGS, *DEPTHWISE_CONFIGS),
        dtypes=FLOATING,
        mutates=0,
    ),
)
