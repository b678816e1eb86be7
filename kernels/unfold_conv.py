# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Unfold the inputs of convolutions into patches (im2col), for all convolutions in one launch.

A patch is the part of the input that one output position multiplies; a tap is one pixel of the convolution's kernel.

Dimensions: N samples, C channels, H and W pixels, G groups, P positions, T taps, I entries of a patch in one group, R
pairs of a sample and a position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu_conv, reference
from .conv_geometry import ConvGeometry, conv_geometries, kernel_sizes_of
from .dispatch import define_op, runs_kernel
from .launches import Updates, entry_launch, prepared
from .pointer_table import (
    FIRST_TILE,
    MAX_ENTRIES,
    TABLE,
    TABLE_CHANGES,
    Entries,
    address,
    entry_at,
    fields,
    launches_of,
    number,
    strides,
)
from .spec import FLOATING, TRITON_TYPES, KernelSpec, all_configs, cdiv, configs_of, nbytes, normal, tiling, tl, triton

(
    _X, _PATCHES,  # addresses
    _SAMPLES, _GROUPS, _POSITIONS, _CHANNELS, _TAPS, _TAPS_FIRST,  # channels of a group; whether I is (T, C) or (C, T)
    _HEIGHT, _WIDTH, _OUT_WIDTH, _TAPS_ACROSS,
    _STEP_DOWN, _STEP_ACROSS, _PADDING_DOWN, _PADDING_ACROSS, _GAP_DOWN, _GAP_ACROSS,
    _X_STRIDE_W, _X_STRIDES,  # of x
) = fields(19, strides=1, after=1)  # fmt: skip


@define_op(fake=lambda x, kernel_sizes, sizes, taps_first: empty_patches(x, kernel_sizes, sizes))
def unfold_conv(x: list[Tensor], kernel_sizes: list[int], sizes: list[int], taps_first: list[bool]) -> list[Tensor]:
    """Return the patches of each convolution's input: what each output position multiplies (M1).

    Args:
        x: inputs [N, C, H, W], without their padding.
        kernel_sizes: the height and width of each convolution's kernel, one after the other.
        sizes: the `ConvGeometry.numbers` of all convolutions, one after the other.
        taps_first: whether I runs over (T, C / groups) rather than over (C / groups, T), for each convolution.

    Returns:
        a_NGPI of each convolution, in the dtype of its input, but in float32 for half precision.

    Raises:
        ValueError: the kernel of a convolution is larger than its padded input.
    """
    for shape in patch_shapes(x, kernel_sizes, sizes):
        if min(shape) < 1:
            raise ValueError(f"the patches [N, G, P, I] of a convolution must not be empty, got {shape}")
    return (launch_unfold if runs_kernel(x) else cpu_conv.unfold_conv)(x, kernel_sizes, sizes, taps_first)


def patch_shapes(x: Sequence[Tensor], kernel_sizes: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield N, G, P and I of each convolution."""
    for x_NCHW, kernel, geometry in zip(x, kernel_sizes_of(kernel_sizes), conv_geometries(sizes), strict=True):
        down, across = geometry.pixels(x_NCHW.shape[2:], kernel)
        inputs = x_NCHW.shape[1] // geometry.groups * kernel[0] * kernel[1]
        yield len(x_NCHW), geometry.groups, max(down, 0) * max(across, 0), inputs


def empty_patches(x: list[Tensor], kernel_sizes: list[int], sizes: list[int]) -> list[Tensor]:
    """Return memory for the result of `unfold_conv`."""
    pairs = zip(x, patch_shapes(x, kernel_sizes, sizes), strict=True)
    return [x_NCHW.new_empty(s, dtype=torch.promote_types(x_NCHW.dtype, torch.float32)) for x_NCHW, s in pairs]


@triton.jit
def _unfold_kernel(
    table_ptr, like_x_ptr, like_patches_ptr, ENTRIES,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_I entries of BLOCK_R patches in one group of a convolution."""
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
    tile = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
    N, P = number(table_ptr, _SAMPLES, entry, ENTRIES), number(table_ptr, _POSITIONS, entry, ENTRIES)
    CHANNELS, TAPS = number(table_ptr, _CHANNELS, entry, ENTRIES), number(table_ptr, _TAPS, entry, ENTRIES)
    INPUTS = CHANNELS * TAPS
    input_tiles, pair_tiles = tl.cdiv(INPUTS, BLOCK_I), tl.cdiv(N * P, BLOCK_R)
    i = tile % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tile // input_tiles % pair_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tile // input_tiles // pair_tiles
    n, p = (r // P).to(tl.int64), r % P
    taps_first = number(table_ptr, _TAPS_FIRST, entry, ENTRIES) != 0
    inner = tl.where(taps_first, CHANNELS, TAPS)
    tap, channel = tl.where(taps_first, i // inner, i % inner), tl.where(taps_first, i % inner, i // inner)
    across, out_width = number(table_ptr, _TAPS_ACROSS, entry, ENTRIES), number(table_ptr, _OUT_WIDTH, entry, ENTRIES)
    # The pixel that a tap reads: that of the patch's first tap, which may lie in the padding, plus the tap's distance.
    row = p // out_width * number(table_ptr, _STEP_DOWN, entry, ENTRIES)
    row -= number(table_ptr, _PADDING_DOWN, entry, ENTRIES)
    column = p % out_width * number(table_ptr, _STEP_ACROSS, entry, ENTRIES)
    column -= number(table_ptr, _PADDING_ACROSS, entry, ENTRIES)
    rows = row[:, None] + (tap // across * number(table_ptr, _GAP_DOWN, entry, ENTRIES))[None, :]
    columns = column[:, None] + (tap % across * number(table_ptr, _GAP_ACROSS, entry, ENTRIES))[None, :]
    inside = (rows >= 0) & (rows < number(table_ptr, _HEIGHT, entry, ENTRIES))
    inside &= (columns >= 0) & (columns < number(table_ptr, _WIDTH, entry, ENTRIES))
    # The numbers of one sample's entries are within 32 bits.
    at = ((group * CHANNELS + channel) * number(table_ptr, _X_STRIDES + 1, entry, ENTRIES))[None, :]
    at += rows * number(table_ptr, _X_STRIDES + 2, entry, ENTRIES)
    at += columns * number(table_ptr, _X_STRIDE_W, entry, ENTRIES)
    written = (r < N * P)[:, None] & (i < INPUTS)[None, :]
    x_ptr = address(table_ptr, _X, entry, ENTRIES, like_x_ptr, 1)
    x_ptr += n[:, None] * tl.load(table_ptr + ENTRIES * _X_STRIDES + entry)
    x = tl.load(x_ptr + at, mask=inside & written, other=0.0)
    patches_ptr = address(table_ptr, _PATCHES, entry, ENTRIES, like_patches_ptr, 4)
    patch = (n * number(table_ptr, _GROUPS, entry, ENTRIES) + group) * P + p
    tl.store(patches_ptr + (patch * INPUTS)[:, None] + i[None, :], x.to(tl.float32), mask=written)


_CONFIGS = {
    dtype: configs_of(
        {"default": tiling(BLOCK_R=8, BLOCK_I=128)},
        _unfold_kernel,
        f"*i64 {entries} *fp32 i32",
        constants={"BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
    )
    for dtype, entries in TRITON_TYPES.items()
}
UNFOLD_CONFIGS = all_configs(_CONFIGS)


def launch_unfold(x: list[Tensor], kernel_sizes: list[int], sizes: list[int], taps_first: list[bool]) -> list[Tensor]:
    """Launch the kernel of `unfold_conv`."""
    patches = empty_patches(x, kernel_sizes, sizes)
    prepared(unfoldings, x, patches, kernel_sizes, sizes, taps_first).start()
    return patches


def unfoldings(
    x: list[Tensor], patches: list[Tensor], kernel_sizes: list[int], sizes: list[int], taps_first: list[bool]
) -> Updates:
    """Return the launches that write the result of `unfold_conv` to ``patches``."""
    geometries = zip(kernel_sizes_of(kernel_sizes), conv_geometries(sizes), strict=True)
    convolutions = [
        (x_NCHW, a_NGPI, *of_conv, first)
        for x_NCHW, a_NGPI, of_conv, first in zip(x, patches, geometries, taps_first, strict=True)
    ]
    launches = []
    for dtype, indices in launches_of([x_NCHW.dtype for x_NCHW in x]):
        chosen, entries = _CONFIGS[dtype]["default"], Entries((x, patches), indices, ())
        numbers = [_numbers(*convolutions[t]) for t in indices]
        columns = {
            **{field: [own[field] for own in numbers] for field in numbers[0]},
            **strides(_X_STRIDES, entries.of(0)),
        }
        tiles = [
            groups * cdiv(n * positions, chosen.block("R")) * cdiv(inputs, chosen.block("I"))
            for n, groups, positions, inputs in (a_NGPI.shape for a_NGPI in entries.of(1))
        ]
        launches.append(entry_launch(chosen, tiles, columns, {_X: 0, _PATCHES: 1}, entries, typed=2))
    return Updates(launches)


def _numbers(
    x_NCHW: Tensor, a_NGPI: Tensor, kernel: tuple[int, int], geometry: ConvGeometry, taps_first: bool
) -> dict[Any, int]:
    """Return the fields of a convolution that hold one number."""
    n, groups, positions, inputs = a_NGPI.shape
    (down, across), taps = kernel, kernel[0] * kernel[1]
    return {
        **{_SAMPLES: n, _GROUPS: groups, _POSITIONS: positions, _CHANNELS: inputs // taps, _TAPS: taps},
        **{_TAPS_FIRST: int(taps_first), _HEIGHT: x_NCHW.shape[2], _WIDTH: x_NCHW.shape[3]},
        **{_OUT_WIDTH: geometry.pixels(x_NCHW.shape[2:], (down, across))[1], _TAPS_ACROSS: across},
        **dict(zip((_STEP_DOWN, _STEP_ACROSS), geometry.stride, strict=True)),
        **dict(zip((_PADDING_DOWN, _PADDING_ACROSS), geometry.padding, strict=True)),
        **dict(zip((_GAP_DOWN, _GAP_ACROSS), geometry.dilation, strict=True)),
        _X_STRIDE_W: x_NCHW.stride(3),
    }


# (shape of the input, kernel size, geometry, taps first) of some layers.
_LAYERS: Sequence[tuple[tuple[int, int, int, int], tuple[int, int], ConvGeometry, bool]] = (
    ((9, 8, 4, 5), (3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1), False),
    ((9, 10, 5, 6), (3, 2), ConvGeometry((2, 1), (0, 1), (1, 2), 2), True),
    ((5, 5, 1, 11), (1, 4), ConvGeometry((1, 3), (0, 2), (1, 1), 1), True),
    ((9, 4, 3, 4), (1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 4), False),
)


def _example(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Return four layers; the input of the second is channels-last."""
    x = [normal(*shape, dtype=dtype, device=device, seed=at) for at, (shape, *_) in enumerate(_LAYERS)]
    x[1] = x[1].to(memory_format=torch.channels_last)
    kernel_sizes = [size for _, kernel, *_ in _LAYERS for size in kernel]
    return x, kernel_sizes, [number for *_, g, _ in _LAYERS for number in g.numbers], [first for *_, first in _LAYERS]


def _patch_bytes(x: list[Tensor], kernel_sizes: list[int], sizes: list[int], *_: object) -> int:
    return nbytes(*x) + 4 * sum(map(math.prod, patch_shapes(x, kernel_sizes, sizes)))


SPECS = (
    KernelSpec(
        name="unfold_conv",
        triton_impl=launch_unfold,
        torch_impl=cpu_conv.unfold_conv,
        reference=reference.unfold_conv,
        examples={"four convolutions": _example},
        flops=lambda x, kernel_sizes, sizes, *_: sum(map(math.prod, patch_shapes(x, kernel_sizes, sizes))),
        bytes=_patch_bytes,
        configs=(*UNFOLD_CONFIGS, *TABLE, *TABLE_CHANGES),
        dtypes=FLOATING,
        mutates=0,
    ),
)
