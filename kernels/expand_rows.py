# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Expand (Jᵀ w) from explicit rows of J, fused with the parameter update, for all weights in one launch.

Dimensions: N samples, K entries of a flat gradient; in a parameter's view O outputs of all groups, T taps of a
convolution's kernel (1 for other layers) and I inputs of a tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_update, reference
from .dispatch import define_op, dispatch, expect, last_contiguous, single_contiguous
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
    strided,
)
from .primitives import output_tap_input, update_entries, weighted_rows
from .project_rows import ROW_UNITS, example_rows, project_rows_parts, unit_of_rows
from .repeated import ProductLaunches
from .spec import FLOATING, TRITON_TYPES, KernelSpec, all_configs, cdiv, configs_of, nbytes, tiling, tl, triton
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
    example_parameters,
    expect_update,
    update_columns,
    update_examples,
)

(
    _J,  # address of J
    _SAMPLES,  # N
    _ROW_STRIDE, _COLUMNS,  # stride between the rows of J, and K: both in units of UNIT elements
    _TAPS, _INPUTS,  # T and I of the parameter's view
) = fields(6, after=AFTER_UPDATE)  # fmt: skip
_POINTERS = {**POINTERS, _J: 3, W: 4, DAMPING: 5, SETTINGS: 6}


@define_op(mutates=("params", "momenta"))
def expand_rows_update_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    j: list[Tensor],
    w: list[Tensor],
    dampings: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
    config: str = "default",
) -> None:
    """Apply `update_` along (grad − Jᵀ w) / damping (equation 7; M4, M5).

    With one position, or a few, `expand_update_` is faster: the factors are smaller than J.

    Args:
        params: strided views [O, T, I] of the parameters, changed in place.
        momenta: the momenta, as views of the same shapes; changed in place. Where each
            is the gradient itself, no momentum is kept, and what is in it afterwards is not defined.
        grads: the gradients, as views of the same shapes.
        j: rows [N, K] of each weight, K running over (O, T, I).
        w: the coefficients w_N of the rows of each J.
        dampings: a scalar for each weight.
        settings: [lr, momentum, weight_decay, shrink] of each weight, as for `update_`.
        nesterov: as for `update_`.
        config: the launch configuration of the kernel.

    Raises:
        ValueError: the shapes of a weight's tensors do not belong together, or there is no such launch configuration.
    """
    arguments = (params, momenta, grads, j, w, dampings, settings, nesterov)
    implementations = (_expand_rows_update_, cpu_update.expand_rows_update_)
    dispatch(*implementations, EXPAND_ROWS_CONFIGS, config, *arguments, check=_expect_rows)


def _expect_rows(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], j: list[Tensor], w: list[Tensor],
    dampings: list[Tensor], settings: list[Tensor], *_: object,
) -> None:  # fmt: skip
    for param, momentum, grad, j_NK, w_N, *numbers in zip(
        params, momenta, grads, j, w, dampings, settings, strict=True
    ):
        expect_update(param, momentum, grad, *numbers)
        expect("j_NK", j_NK, w_N.shape[0], param.numel())


@triton.jit
def _expand_rows_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_j_ptr, like_w_ptr, ENTRIES,
    UNIT: tl.constexpr, NESTEROV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Update BLOCK_K entries of one weight, counted in the order of J's columns."""
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
    tile = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
    param_ptr = address(table_ptr, PARAM, entry, ENTRIES, like_param_ptr, 1)
    momentum_ptr = address(table_ptr, MOMENTUM, entry, ENTRIES, like_momentum_ptr, 1)
    grad_ptr = address(table_ptr, GRAD, entry, ENTRIES, like_grad_ptr, 1)
    j_ptr = address(table_ptr, _J, entry, ENTRIES, like_j_ptr, UNIT)
    w_ptr = address(table_ptr, W, entry, ENTRIES, like_w_ptr, 1)
    damping_ptr = address(table_ptr, DAMPING, entry, ENTRIES, like_w_ptr, 1)
    settings_ptr = address(table_ptr, SETTINGS, entry, ENTRIES, like_w_ptr, 1)
    N = number(table_ptr, _SAMPLES, entry, ENTRIES)
    stride_jn = number(table_ptr, _ROW_STRIDE, entry, ENTRIES) * UNIT
    K = number(table_ptr, _COLUMNS, entry, ENTRIES) * UNIT
    TAPS, INPUTS = number(table_ptr, _TAPS, entry, ENTRIES), number(table_ptr, _INPUTS, entry, ENTRIES)
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    expanded = weighted_rows(j_ptr, w_ptr, col, N, K, stride_jn, BLOCK_N, BLOCK_K)
    o, tap, i = output_tap_input(col, TAPS, INPUTS)
    update_entries(
        param_ptr, momentum_ptr, grad_ptr,
        strided(table_ptr, PARAM_STRIDES, entry, ENTRIES, o, tap, i),
        strided(table_ptr, MOMENTUM_STRIDES, entry, ENTRIES, o, tap, i),
        strided(table_ptr, GRAD_STRIDES, entry, ENTRIES, o, tap, i),
        col < K, expanded, damping_ptr, settings_ptr, NESTEROV,
    )  # fmt: skip


_TILINGS = {
    "default": tiling(BLOCK_N=8, BLOCK_K=512),
    "narrow": tiling(BLOCK_N=16, BLOCK_K=128),  # more programs for a small parameter
}
_CONFIGS = {
    (dtype, unit, nesterov): configs_of(
        _TILINGS,
        _expand_rows_update_kernel,
        f"*i64 *fp32 *fp32 *fp32 {entries} *fp32 i32",
        constants={"UNIT": unit, "NESTEROV": nesterov, "BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
    )
    for dtype, entries in TRITON_TYPES.items()
    for unit in ROW_UNITS
    for nesterov in (False, True)
}
EXPAND_ROWS_CONFIGS = (*all_configs(_CONFIGS), *TABLE, *TABLE_CHANGES)


def _expand_rows_update_(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], j: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, config: str = "default",
) -> None:  # fmt: skip
    prepared(expand_rows_updates, params, momenta, grads, j, w, dampings, settings, nesterov, config).start()


def expand_rows_updates(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], j: list[Tensor],
    w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool, config: str,
) -> Updates:  # fmt: skip
    """Return the launches of `expand_rows_update_`."""
    _expect_rows(params, momenta, grads, j, w, dampings, settings)
    copies: list[Tensor] = []
    j = converted(last_contiguous, j, copies)
    numbers = [converted(single_contiguous, x, copies) for x in (w, dampings, settings)]
    lists, launches = (params, momenta, grads, j, *numbers), []
    keys = [
        ((param.dtype, momentum.dtype, grad.dtype), j_NK.dtype, unit_of_rows(j_NK))
        for param, momentum, grad, j_NK in zip(params, momenta, grads, j, strict=True)
    ]
    for (_, dtype, unit), indices in launches_of(keys):
        chosen = _CONFIGS[dtype, unit, nesterov][config]
        entries = Entries(lists, indices, copies)
        params_, j_ = entries.of(0), entries.of(3)
        columns = {
            **update_columns(entries, unit=1),
            _SAMPLES: [len(j_NK) for j_NK in j_],
            _ROW_STRIDE: [j_NK.stride(0) // unit for j_NK in j_],
            _COLUMNS: [j_NK.shape[1] // unit for j_NK in j_],
            _TAPS: [param_OTI.shape[1] for param_OTI in params_],
            _INPUTS: [param_OTI.shape[2] for param_OTI in params_],
        }
        tiles = [cdiv(j_NK.shape[1], chosen.block("K")) for j_NK in j_]
        launches.append(entry_launch(chosen, tiles, columns, _POINTERS, entries, typed=5))
    return Updates(launches)


def rows_products(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], j: list[Tensor], w: list[Tensor],
    dampings: list[Tensor], settings: list[Tensor], nesterov: bool, blocks: list[int], configs: Sequence[str],
) -> ProductLaunches:  # fmt: skip
    """Return the launches of `project_rows` and `expand_rows_update_`; ``configs`` has one of each."""
    parts = project_rows_parts(j, grads, blocks, configs[0])
    updates = expand_rows_updates(params, momenta, grads, j, w, dampings, settings, nesterov, configs[1])
    return ProductLaunches(parts, updates, 1, params, momenta, ())


def _example(dtype: torch.dtype, device: torch.device, nesterov: bool, half: bool) -> tuple[object, ...]:
    shapes, param_dtype = ((48, 9, 10), (7, 9, 10), (5, 1, 1)), example_param_dtype(dtype, half)
    states = zip(*(example_parameters(*shape, device, param_dtype) for shape in shapes), strict=True)
    numbers = zip(*(example_numbers(n, device) for n in (50, 50, 33)), strict=True)
    return *map(list, states), example_rows(dtype, device), *map(list, numbers), nesterov


SPECS = (
    KernelSpec(
        name="expand_rows_update_",
        triton_impl=_expand_rows_update_,
        torch_impl=cpu_update.expand_rows_update_,
        reference=reference.expand_rows_update_,
        examples=update_examples(_example),
        flops=lambda params, momenta, grads, j, *_: sum(2 * x.numel() + 9 * x.shape[1] for x in j),
        bytes=lambda params, momenta, grads, j, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *j),
        configs=EXPAND_ROWS_CONFIGS,
        dtypes=FLOATING,
        mutates=2,
    ),
)
