# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Expand (Jᵀ w) from factors, fused with the parameter update, for all weights in one launch.

Dimensions: N samples, G groups, P positions, R pairs of a sample and a position, I inputs and O outputs of a group; in
a parameter's view O outputs of all groups, T taps of a convolution's kernel (1 for other layers) and I inputs of a tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_update, reference
from .dispatch import define_op, dispatch, expect, single_contiguous, widen_contiguous
from .factors import (
    EXAMPLE_SHAPES,
    FACTOR_UNITS,
    example_layers,
    expect_view,
    product_flops,
    sizes_of,
    unit_of,
    view_offsets,
)
from .launches import Updates, converted, entry_launch, prepared
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
from .primitives import update_entries, weighted_outer
from .project_factored import project_parts
from .repeated import ProductLaunches, Temporaries
from .spec import (
    FLOATING,
    KernelSpec,
    all_configs,
    cdiv,
    config_named,
    configs_of,
    in_tf32x3,
    nbytes,
    tiling,
    tl,
    triton,
)
from .update import (
    AFTER_UPDATE,
    DAMPING,
    GRAD,
    GRAD_STRIDES,
    MOMENTUM,
    MOMENTUM_STRIDES,
    PARAM,
    PARAM_STRIDES,
    POINTERS,
    SETTINGS,
    W,
    example_numbers,
    example_param_dtype,
    expect_update,
    update_columns,
    update_examples,
)

(
    _A, _G,  # addresses of the factors
    _SAMPLES, _POSITIONS,  # N and P
    _CHANNELS,  # inputs of a tap
    _INPUTS, _OUTPUTS,  # inputs (of all taps) and outputs of a group, in units of UNIT elements
    _A_STRIDES, _G_STRIDES,  # of the factors' first three dimensions, in units of UNIT elements
) = fields(7, strides=2, after=AFTER_UPDATE)  # fmt: skip
_POINTERS = {**POINTERS, _A: 3, _G: 4, W: 5, DAMPING: 6, SETTINGS: 7}


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

    With many positions, `sample_grads` once and `expand_rows_update_` in every step are faster: this op takes 2 N P I O
    operations in every step.

    Args:
        params: strided views [O, T, I] of the parameters, with O over all groups and (T, I) over the inputs of ``a``.
            For a convolution T counts the taps and I the channels; for any other layer T is 1. Changed in place.
        momenta: the momenta, as views of the same shapes; changed in place. Where each
            is the gradient itself, no momentum is kept, and what is in it afterwards is not defined.
        grads: the gradients, as views of the same shapes.
        a: inputs [N, G, P, I] of each weight's layer.
        g: output gradients [N, G, P, O] of each layer.
        w: the coefficients w_N of the rows of each J.
        dampings: a scalar for each weight.
        settings: [lr, momentum, weight_decay, shrink] of each weight, as for `update_`.
        nesterov: as for `update_`.
        config: the launch configuration of the kernel.

    Raises:
        ValueError: the shapes of a layer's tensors do not belong together, or there is no such launch configuration.
    """
    arguments = (params, momenta, grads, a, g, w, dampings, settings, nesterov)
    implementations = (launch_expand_update_, cpu_update.expand_update_)
    dispatch(*implementations, EXPAND_CONFIGS, config, *arguments, check=_expect_layers)


def _expect_layers(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], a: list[Tensor], g: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], *_: object,
) -> None:  # fmt: skip
    for param, momentum, grad, a_NGPI, g_NGPO, w_N, *numbers in zip(
        params, momenta, grads, a, g, w, dampings, settings, strict=True
    ):
        expect_update(param, momentum, grad, *numbers)
        expect_view("param_OTI", param, a_NGPI, g_NGPO)
        expect("w_N", w_N, a_NGPI.shape[0])


@triton.jit
def _expand_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_ptr, ENTRIES, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, NESTEROV: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Update one [BLOCK_O, BLOCK_I] tile of one group of a weight."""
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
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
        address(table_ptr, W, entry, ENTRIES, like_ptr, 1), group, o, i, N, P, INPUTS, OUTPUTS,
        number(table_ptr, _A_STRIDES, entry, ENTRIES) * UNIT, number(table_ptr, _A_STRIDES + 1, entry, ENTRIES) * UNIT,
        number(table_ptr, _A_STRIDES + 2, entry, ENTRIES) * UNIT,
        number(table_ptr, _G_STRIDES, entry, ENTRIES) * UNIT, number(table_ptr, _G_STRIDES + 1, entry, ENTRIES) * UNIT,
        number(table_ptr, _G_STRIDES + 2, entry, ENTRIES) * UNIT,
        PRECISION, BLOCK_R, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    output = group * OUTPUTS + o
    update_entries(
        address(table_ptr, PARAM, entry, ENTRIES, like_param_ptr, UNIT),
        address(table_ptr, MOMENTUM, entry, ENTRIES, like_momentum_ptr, UNIT),
        address(table_ptr, GRAD, entry, ENTRIES, like_grad_ptr, UNIT),
        view_offsets(table_ptr, PARAM_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        view_offsets(table_ptr, MOMENTUM_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        view_offsets(table_ptr, GRAD_STRIDES, entry, ENTRIES, output, i, CHANNELS, UNIT),
        (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], expanded,
        address(table_ptr, DAMPING, entry, ENTRIES, like_ptr, 1),
        address(table_ptr, SETTINGS, entry, ENTRIES, like_ptr, 1),
        NESTEROV,
    )  # fmt: skip


_ALIGNED = {
    "default": tiling(BLOCK_R=32, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
    # For a single small layer: more programs.
    "small": tiling(BLOCK_R=32, BLOCK_O=32, BLOCK_I=32, num_warps=4, num_stages=3),
    # For large layers: fewer reads of the factors.
    "large": tiling(BLOCK_R=16, BLOCK_O=128, BLOCK_I=64, num_warps=8, num_stages=4),
    **in_tf32x3(BLOCK_R=32, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=3),
}
# Unaligned views need three sets of 64-bit offsets. With a larger tile than the default's, registers would spill.
_UNALIGNED = {
    "default": _ALIGNED["default"],
    "small": _ALIGNED["small"],
    "large": tiling(BLOCK_R=16, BLOCK_O=64, BLOCK_I=64, num_warps=8, num_stages=4),
}
_CONFIGS = {
    (unit, nesterov): configs_of(
        _ALIGNED if unit > 1 else _UNALIGNED,
        _expand_update_kernel,
        "*i64 *fp32 *fp32 *fp32 *fp32 i32",
        constants={"UNIT": unit, "PRECISION": "ieee", "NESTEROV": nesterov, "BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
        async_copies=unit > 1,
    )
    for unit in FACTOR_UNITS
    for nesterov in (False, True)
}
EXPAND_CONFIGS = (*all_configs(_CONFIGS), *TABLE, *TABLE_CHANGES)


def launch_expand_update_(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], a: list[Tensor], g: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, config: str = "default",
) -> None:  # fmt: skip
    """Launch the kernel of `expand_update_`."""
    prepared(expand_updates, params, momenta, grads, a, g, w, dampings, settings, nesterov, config).start()


def expand_updates(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], a: list[Tensor], g: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, config: str,
) -> Updates:  # fmt: skip
    """Return the launches of `expand_update_`."""
    _expect_layers(params, momenta, grads, a, g, w, dampings, settings)
    copies: list[Tensor] = []
    a, g = (converted(widen_contiguous, factors, copies) for factors in (a, g))
    numbers = [converted(single_contiguous, x, copies) for x in (w, dampings, settings)]
    lists, launches = (params, momenta, grads, a, g, *numbers), []
    keys = [
        ((param.dtype, momentum.dtype, grad.dtype), unit_of(a_NGPI, g_NGPO, param, momentum, grad))
        for param, momentum, grad, a_NGPI, g_NGPO in zip(params, momenta, grads, a, g, strict=True)
    ]
    for (_, unit), indices in launches_of(keys):
        chosen = config_named(_CONFIGS[unit, nesterov], config)
        entries = Entries(lists, indices, copies)
        a_, g_ = entries.of(3), entries.of(4)
        sizes, (tile_o, tile_i) = sizes_of(a_, g_), (chosen.block("O"), chosen.block("I"))
        tiles = [size.groups * cdiv(size.outputs, tile_o) * cdiv(size.inputs, tile_i) for size in sizes]
        columns = {
            **update_columns(entries, unit),
            _SAMPLES: [size.samples for size in sizes],
            _POSITIONS: [size.positions for size in sizes],
            _CHANNELS: [params[t].shape[2] for t in indices],
            _INPUTS: [size.inputs // unit for size in sizes],
            _OUTPUTS: [size.outputs // unit for size in sizes],
            **strides(_A_STRIDES, a_, unit),
            **strides(_G_STRIDES, g_, unit),
        }
        launches.append(entry_launch(chosen, tiles, columns, _POINTERS, entries, typed=4))
    return Updates(launches)


def factors_products(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], a: list[Tensor], g: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, blocks: list[int],
    configs: Sequence[str],
) -> ProductLaunches:  # fmt: skip
    """Return the launches of `project` and `expand_update_`; ``configs`` has one of each."""
    (a, of_a), (g, of_g) = _as_read(a, 0), _as_read(g, 1)
    parts = project_parts(a, g, grads, blocks, configs[0])
    updates = expand_updates(params, momenta, grads, a, g, w, dampings, settings, nesterov, configs[1])
    return ProductLaunches(parts, updates, 2, params, momenta, (*of_a, *of_g))


def _as_read(factors: list[Tensor], argument: int) -> tuple[list[Tensor], list[Temporaries]]:
    """Return factors as the kernels read them, and how each step gets these if they are no ``argument`` of project."""
    if all(widen_contiguous(x) is x for x in factors):
        return factors, []

    def fill(made: list[Tensor]) -> None:
        torch._foreach_copy_(made, factors)

    shapes = [x.shape for x in factors]
    read = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in factors]  # as each step makes them
    return read, [Temporaries(shapes, fill, argument, [()] * len(factors))]


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
        dtypes=FLOATING,
        mutates=2,
    ),
)
