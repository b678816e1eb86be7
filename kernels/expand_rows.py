# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Expand (Jᵀ w) with explicit per-sample gradients and the update in its epilogue, all weights in one launch.

Dimensions: N samples, K entries of a flat gradient; in a parameter's view O outputs of all groups, K kernel pixels and
I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from .pointer_table import MAX_GROUP, TABLE, GroupEntry, address, batches, entry, launch_group, member_at, number
from .cpu import combinations
from .project_rows import UNITS, example_rows, unit_of_rows
from .spec import (
    TRITON_TYPES,
    Config,
    Constants,
    KernelSpec,
    cdiv,
    contiguous,
    expect,
    nbytes,
    rows_contiguous,
    runs_kernel,
    tl,
    triton,
)
from .primitives import update_entries, weighted_rows
from .update import example_numbers, example_parameters, expect_update, negated_ratios, update_along_


@custom_op("tengrad_triton::expand_rows_update_", mutates_args=("params", "momenta"))
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
    """Step parameters along (grad − Jᵀ w) / damping in place; see `update_` for the rest of the rule.

    The parameter-shaped tensors are strided views [O, K, I], over which J's flat entries run.
    """
    for one in zip(params, momenta, grads, j, w, dampings, settings, strict=True):
        expect_update(*one[:3], *one[5:])
        expect("j_NK", one[3], one[4].shape[0], one[0].numel())
    kernel = runs_kernel(*params, *momenta, *grads, *j, *w)
    update = partial(_expand_rows_update_, config=config) if kernel else expand_rows_update_torch_
    update(params, momenta, grads, j, w, dampings, settings, nesterov)


def expand_rows_update_torch_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    j: list[Tensor],
    w: list[Tensor],
    dampings: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
) -> None:
    """`update_` along (grad − Jᵀ w) / damping."""
    expanded = combinations(j, negated_ratios(w, dampings))
    update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


@triton.jit
def _expand_rows_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_j_ptr, like_w_ptr, MEMBERS,
    UNIT: tl.constexpr, NESTEROV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The update rule on BLOCK_K entries of one member, counted in the order of J's columns.

    Fields: parameter, momentum, gradient, J, w, damping, settings; first tile; row stride of J in UNITs, N,
    columns in UNITs, PIXELS, INPUTS, strides of the first three.
    """
    tile = tl.program_id(0)
    member = member_at(table_ptr + 7 * MEMBERS, tile, MEMBERS, BLOCK_T)
    param_ptr = address(table_ptr, 0, member, MEMBERS, like_param_ptr, 1)
    momentum_ptr = address(table_ptr, 1, member, MEMBERS, like_momentum_ptr, 1)
    grad_ptr = address(table_ptr, 2, member, MEMBERS, like_grad_ptr, 1)
    j_ptr = address(table_ptr, 3, member, MEMBERS, like_j_ptr, UNIT)
    w_ptr, damping_ptr = (
        address(table_ptr, 4, member, MEMBERS, like_w_ptr, 1), address(table_ptr, 5, member, MEMBERS, like_w_ptr, 1)
    )  # fmt: skip
    settings_ptr = address(table_ptr, 6, member, MEMBERS, like_w_ptr, 1)
    stride_jn, N = number(table_ptr, 8, member, MEMBERS) * UNIT, number(table_ptr, 9, member, MEMBERS)
    K, PIXELS = number(table_ptr, 10, member, MEMBERS) * UNIT, number(table_ptr, 11, member, MEMBERS)
    INPUTS = number(table_ptr, 12, member, MEMBERS)
    cols = (tile - number(table_ptr, 7, member, MEMBERS)).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    expanded = weighted_rows(j_ptr, w_ptr, cols, N, K, stride_jn, BLOCK_N, BLOCK_K)
    o = cols // INPUTS // PIXELS
    pixel = cols // INPUTS % PIXELS
    i = cols % INPUTS
    update_entries(
        param_ptr, momentum_ptr, grad_ptr, entry(table_ptr, 13, member, MEMBERS, o, pixel, i),
        entry(table_ptr, 16, member, MEMBERS, o, pixel, i), entry(table_ptr, 19, member, MEMBERS, o, pixel, i),
        cols < K, expanded, damping_ptr, settings_ptr, NESTEROV,
    )  # fmt: skip


_TILES: dict[str, Constants] = {
    "default": {"BLOCK_N": 8, "BLOCK_K": 512},
    "narrow": {"BLOCK_N": 16, "BLOCK_K": 128},
}
_EXPAND_ROWS_UPDATE = {
    (tile, dtype, unit, nesterov): Config(
        kernel=_expand_rows_update_kernel,
        types=f"*i64 *fp32 *fp32 *fp32 {entries} *fp32 i32",
        constants={"UNIT": unit, "NESTEROV": nesterov, "BLOCK_T": MAX_GROUP, **constants},
        unaligned=("MEMBERS",),
        name=tile,
    )
    for tile, constants in _TILES.items()
    for dtype, entries in TRITON_TYPES.items()
    for unit in UNITS
    for nesterov in (False, True)
}


def _expand_rows_update_(
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
    j = [rows_contiguous(j_NK) for j_NK in j]
    w, dampings, settings = ([contiguous(x.float()) for x in numbers] for numbers in (w, dampings, settings))
    states = list(zip(params, momenta, grads, j, w, dampings, settings, strict=True))
    keys = [(*(x.dtype for x in state[:4]), unit_of_rows(state[3])) for state in states]
    for (*_, dtype, unit), alike in batches(keys):
        launch, members = _EXPAND_ROWS_UPDATE[config, dtype, unit, nesterov], []
        for state in (states[t] for t in alike):
            n, k = state[3].shape
            strides = (stride for x in state[:3] for stride in x.stride())
            sizes = (state[3].stride(0) // unit, n, k // unit, *state[0].shape[1:], *strides)
            members.append(GroupEntry(state, sizes, cdiv(k, launch.block("K"))))
        launch_group(launch, members, members[0].tensors[:5])


def _update_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    shapes = ((48, 9, 10), (7, 9, 10), (5, 1, 1))
    states = zip(*(example_parameters(*shape, device) for shape in shapes), strict=True)
    numbers = zip(*(example_numbers(n, device) for n in (50, 50, 33)), strict=True)
    return *map(list, states), example_rows(dtype, device), *map(list, numbers), nesterov


SPECS = (
    KernelSpec(
        name="expand_rows_update_",
        triton_impl=_expand_rows_update_,
        torch_impl=expand_rows_update_torch_,
        examples={name: partial(_update_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda params, momenta, grads, j, *_: sum(2 * x.numel() + 9 * x.shape[1] for x in j),
        bytes=lambda params, momenta, grads, j, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *j),
        configs=(*_EXPAND_ROWS_UPDATE.values(), TABLE),
        mutates=2,
    ),
)
