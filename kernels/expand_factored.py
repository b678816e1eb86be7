# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Expand (Jᵀ w) with factored per-sample gradients and the update in its epilogue, all weights in one launch.

Dimensions: N samples, G groups, P positions, R pairs of a sample and a position, I inputs and O outputs of a group; in
a parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_update, reference
from .dispatch import contiguous, define_op, dispatch, expect, last_contiguous, widen
from .factors import EXAMPLE_SHAPES, UNITS, example_layers, expect_view, product_flops, sizes_of, unit_of, view_offsets
from .pointer_table import (
    FIRST_TILE,
    MAX_GROUP,
    TABLE,
    address,
    addresses,
    batches,
    entry_at,
    fields,
    launch_group,
    number,
    strides,
)
from .primitives import update_entries, weighted_outer
from .spec import KernelSpec, all_configs, cdiv, configs_of, nbytes, tiling, tl, triton
from .update import example_numbers, example_param_dtype, expect_update, update_examples

# The fields of a weight: addresses; N, P, and I of a pixel; and in UNITs I, O, and the strides of the first five.
(
    _PARAM, _MOMENTUM, _GRAD, _A, _G, _W, _DAMPING, _SETTINGS, _SAMPLES, _POSITIONS, _CHANNELS, _INPUTS, _OUTPUTS,
    _PARAM_STRIDES, _MOMENTUM_STRIDES, _GRAD_STRIDES, _A_STRIDES, _G_STRIDES,
) = fields(13, strides=5, after=1)  # fmt: skip


@define_op(mutates=("params", "momenta"))
def expand_update_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    a: list[Tensor],
    g: list[Tensor],
    w: list[Tensor],
    dampings: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
    config: str = "default",
) -> None:
    """Apply `update_` along (grad − Σ_n w_n J_n) / damping with J_n = Σ_p g_np a_npᵀ (equation 7; M4, M5).

    With many positions prefer `sample_grads` once and `expand_rows_update_`: this costs 2 N P I O operations each time.

    Args:
        params: strided views [O, K, I] of the parameters, with O over all groups and (K, I) over the inputs of ``a``:
            of a convolution K are the kernel's pixels and I the channels, of any other layer K is 1. Changed in place.
        momenta: likewise, changed in place.
        grads: likewise.
        a: inputs [N, G, P, I] of each weight's layer.
        g: output derivatives [N, G, P, O] of each layer.
        w: the weights w_N of the rows of each J.
        dampings: a scalar for each weight.
        settings: [lr, momentum, weight_decay, shrink] of each weight, as for `update_`.
        nesterov: as for `update_`.
        config: the launch configuration of the kernel.

    Raises:
        ValueError: the shapes of a layer's tensors do not belong together.
    """
    for param, momentum, grad, a_NGPI, g_NGPO, w_N, *numbers in zip(
        params, momenta, grads, a, g, w, dampings, settings, strict=True
    ):
        expect_update(param, momentum, grad, *numbers)
        expect_view("param_OKI", param, a_NGPI, g_NGPO)
        expect("w_N", w_N, a_NGPI.shape[0])
    arguments = (params, momenta, grads, a, g, w, dampings, settings, nesterov)
    dispatch(launch_expand_update_, cpu_update.expand_update_, config, *arguments)


@triton.jit
def _expand_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_ptr, ENTRIES, UNIT: tl.constexpr,
    NESTEROV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Update one [BLOCK_O, BLOCK_I] tile of one group of a weight."""
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_T)
    tile = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
    N, P = number(table_ptr, _SAMPLES, entry, ENTRIES), number(table_ptr, _POSITIONS, entry, ENTRIES)
    CHANNELS = number(table_ptr, _CHANNELS, entry, ENTRIES)
    INPUTS = number(table_ptr, _INPUTS, entry, ENTRIES) * UNIT
    OUTPUTS = number(table_ptr, _OUTPUTS, entry, ENTRIES) * UNIT
    output_tiles, input_tiles = tl.cdiv(OUTPUTS, BLOCK_O), tl.cdiv(INPUTS, BLOCK_I)
    o = tile % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile // output_tiles % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    group = (tile // output_tiles // input_tiles).to(tl.int64)
    expanded = weighted_outer(
        address(table_ptr, _A, entry, ENTRIES, like_ptr, UNIT),
        address(table_ptr, _G, entry, ENTRIES, like_ptr, UNIT),
        address(table_ptr, _W, entry, ENTRIES, like_ptr, 1), group, o, i, N, P, INPUTS, OUTPUTS,
        number(table_ptr, _A_STRIDES, entry, ENTRIES) * UNIT, number(table_ptr, _A_STRIDES + 1, entry, ENTRIES) * UNIT,
        number(table_ptr, _A_STRIDES + 2, entry, ENTRIES) * UNIT,
        number(table_ptr, _G_STRIDES, entry, ENTRIES) * UNIT, number(table_ptr, _G_STRIDES + 1, entry, ENTRIES) * UNIT,
        number(table_ptr, _G_STRIDES + 2, entry, ENTRIES) * UNIT,
        BLOCK_R, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    output = group * OUTPUTS + o
    update_entries(
        address(table_ptr, _PARAM, entry, ENTRIES, like_param_ptr, UNIT),
        address(table_ptr, _MOMENTUM, entry, ENTRIES, like_momentum_ptr, UNIT),
        address(table_ptr, _GRAD, entry, ENTRIES, like_grad_ptr, UNIT),
        view_offsets(table_ptr, _PARAM_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        view_offsets(table_ptr, _MOMENTUM_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        view_offsets(table_ptr, _GRAD_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], expanded,
        address(table_ptr, _DAMPING, entry, ENTRIES, like_ptr, 1),
        address(table_ptr, _SETTINGS, entry, ENTRIES, like_ptr, 1),
        NESTEROV,
    )  # fmt: skip


_ALIGNED = {
    "default": tiling(BLOCK_R=32, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
    # For a small layer alone, which fills no device.
    "small": tiling(BLOCK_R=32, BLOCK_O=32, BLOCK_I=32, num_warps=4, num_stages=3),
    # More arithmetic for each factor that is read.
    "large": tiling(BLOCK_R=32, BLOCK_O=128, BLOCK_I=64, num_warps=8, num_stages=3),
}
# The epilogue then has three sets of 64-bit offsets, which spill with more entries a thread than the default's.
_UNALIGNED = _ALIGNED | {"large": tiling(BLOCK_R=16, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=4)}
_CONFIGS = {
    (unit, nesterov): configs_of(
        _ALIGNED if unit > 1 else _UNALIGNED,
        {"UNIT": unit, "NESTEROV": nesterov, "BLOCK_T": MAX_GROUP},
        kernel=_expand_update_kernel,
        types="*i64 *fp32 *fp32 *fp32 *fp32 i32",
        unaligned=("ENTRIES",),
        async_copies=unit > 1,
    )
    for unit in UNITS
    for nesterov in (False, True)
}
EXPAND_CONFIGS = (*all_configs(_CONFIGS), TABLE)


def launch_expand_update_(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], a: list[Tensor], g: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, config: str = "default",
) -> None:  # fmt: skip
    """Launch the kernel of `expand_update_`."""
    a, g = ([last_contiguous(widen(x)) for x in factors] for factors in (a, g))
    w, dampings, settings = ([contiguous(x.float()) for x in numbers] for numbers in (w, dampings, settings))
    keys = [
        ((param.dtype, momentum.dtype, grad.dtype), unit_of(a_NGPI, g_NGPO, param, momentum, grad))
        for param, momentum, grad, a_NGPI, g_NGPO in zip(params, momenta, grads, a, g, strict=True)
    ]
    for (_, unit), indices in batches(keys):
        launch = _CONFIGS[unit, nesterov][config]
        params_, momenta_, grads_, a_, g_, w_, dampings_, settings_ = (
            [x[t] for t in indices] for x in (params, momenta, grads, a, g, w, dampings, settings)
        )
        sizes, (tile_o, tile_i) = sizes_of(a_, g_), (launch.block("O"), launch.block("I"))
        tiles = [size.groups * cdiv(size.outputs, tile_o) * cdiv(size.inputs, tile_i) for size in sizes]
        columns = {
            _PARAM: addresses(params_),
            _MOMENTUM: addresses(momenta_),
            _GRAD: addresses(grads_),
            _A: addresses(a_),
            _G: addresses(g_),
            _W: addresses(w_),
            _DAMPING: addresses(dampings_),
            _SETTINGS: addresses(settings_),
            _SAMPLES: [size.samples for size in sizes],
            _POSITIONS: [size.positions for size in sizes],
            _CHANNELS: [param_OKI.shape[2] for param_OKI in params_],
            _INPUTS: [size.inputs // unit for size in sizes],
            _OUTPUTS: [size.outputs // unit for size in sizes],
            **strides(_PARAM_STRIDES, params_, unit),
            **strides(_MOMENTUM_STRIDES, momenta_, unit),
            **strides(_GRAD_STRIDES, grads_, unit),
            **strides(_A_STRIDES, a_, unit),
            **strides(_G_STRIDES, g_, unit),
        }
        launch_group(launch, tiles, columns, (params_[0], momenta_[0], grads_[0], a_[0]))


def _example(dtype: torch.dtype, device: torch.device, nesterov: bool, half: bool) -> tuple[object, ...]:
    layers, views = example_layers(dtype, device, example_param_dtype(dtype, half))
    numbers = zip(*(example_numbers(shape[0], device) for shape, _ in EXAMPLE_SHAPES), strict=True)
    return *views, *layers, *map(list, numbers), nesterov


SPECS = (
    KernelSpec(
        name="expand_update_",
        triton_impl=launch_expand_update_,
        torch_impl=cpu_update.expand_update_,
        reference=reference.expand_update_,
        examples=update_examples(_example),
        flops=lambda params, momenta, grads, a, g, *_: product_flops(a, g) + 9 * sum(x.numel() for x in params),
        bytes=lambda params, momenta, grads, a, g, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *a, *g),
        configs=EXPAND_CONFIGS,
        mutates=2,
    ),
)
