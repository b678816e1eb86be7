# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Expand (Jᵀ w) with factored per-sample gradients and the update in its epilogue, all weights in one launch.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; in a parameter's view O outputs of all
groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from .pointer_table import MAX_GROUP, TABLE, GroupEntry, address, batches, launch_group, member_at, number
from .cpu import combined_outer
from .project_factored import (
    EXAMPLE_SHAPES,
    UNITS,
    example_layers,
    expect_view,
    in_units,
    matrix_entries,
    product_flops,
    unit_of,
)
from .spec import Config, KernelSpec, cdiv, contiguous, expect, nbytes, rows_contiguous, runs_kernel, tl, triton, widen
from .primitives import update_entries, weighted_outer
from .update import example_numbers, expect_update, negated_ratios, update_along_


@custom_op("tengrad_triton::expand_update_", mutates_args=("params", "momenta"))
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
    """Step parameters along (grad − Σ_n w_n J_n) / damping in place (paper, equation 7); `update_` is the rule.

    The parameter-shaped tensors are strided views with O running over all groups and (K, I) over the canonical form's
    inputs: for a convolution K is the kernel's pixels and I its channels, for everything else K is 1.
    """
    for param, momentum, grad, a_NGPI, g_NGPO, w_N, *numbers in zip(
        params, momenta, grads, a, g, w, dampings, settings, strict=True
    ):
        expect_update(param, momentum, grad, *numbers)
        expect_view("param_OKI", param, a_NGPI, g_NGPO)
        expect("w_N", w_N, a_NGPI.shape[0])
    kernel = runs_kernel(*params, *momenta, *grads, *a, *g, *w)
    update = partial(_expand_update_, config=config) if kernel else expand_update_torch_
    update(params, momenta, grads, a, g, w, dampings, settings, nesterov)


def expand_update_torch_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    a: list[Tensor],
    g: list[Tensor],
    w: list[Tensor],
    dampings: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
) -> None:
    """`update_` along (grad − U) / damping with U_γ = Σ_np w_n g_nγp a_nγpᵀ."""
    factors = zip(a, g, negated_ratios(w, dampings), strict=True)
    expanded = (
        (t, combined_outer(widen(a_NGPI), widen(g_NGPO), u_N)) for t, (a_NGPI, g_NGPO, u_N) in enumerate(factors)
    )
    update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


@triton.jit
def _expand_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_a_ptr, MEMBERS, UNIT: tl.constexpr,
    NESTEROV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The update rule on one [BLOCK_O, BLOCK_I] tile of one group of a member.

    Fields: parameter, momentum, gradient, a, g, w, damping, settings; first tile; N, P, CHANNELS; in UNITs INPUTS,
    OUTPUTS, the strides of a and g but the last, and those of the first three.
    """
    tile = tl.program_id(0)
    member = member_at(table_ptr + 8 * MEMBERS, tile, MEMBERS, BLOCK_T)
    tile -= number(table_ptr, 8, member, MEMBERS)
    N, P = number(table_ptr, 9, member, MEMBERS), number(table_ptr, 10, member, MEMBERS)
    CHANNELS = number(table_ptr, 11, member, MEMBERS)
    INPUTS = number(table_ptr, 12, member, MEMBERS) * UNIT
    OUTPUTS = number(table_ptr, 13, member, MEMBERS) * UNIT
    output_tiles, input_tiles = tl.cdiv(OUTPUTS, BLOCK_O), tl.cdiv(INPUTS, BLOCK_I)
    o = tile % output_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile // output_tiles % input_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    group = (tile // output_tiles // input_tiles).to(tl.int64)
    expanded = weighted_outer(
        address(table_ptr, 3, member, MEMBERS, like_a_ptr, UNIT),
        address(table_ptr, 4, member, MEMBERS, like_a_ptr, UNIT),
        address(table_ptr, 5, member, MEMBERS, like_a_ptr, 1), group, o, i, N, P, INPUTS, OUTPUTS,
        number(table_ptr, 14, member, MEMBERS) * UNIT, number(table_ptr, 15, member, MEMBERS) * UNIT,
        number(table_ptr, 16, member, MEMBERS) * UNIT, number(table_ptr, 17, member, MEMBERS) * UNIT,
        number(table_ptr, 18, member, MEMBERS) * UNIT, number(table_ptr, 19, member, MEMBERS) * UNIT,
        BLOCK_R, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    row = group * OUTPUTS + o
    update_entries(
        address(table_ptr, 0, member, MEMBERS, like_param_ptr, UNIT),
        address(table_ptr, 1, member, MEMBERS, like_momentum_ptr, UNIT),
        address(table_ptr, 2, member, MEMBERS, like_grad_ptr, UNIT),
        matrix_entries(table_ptr, 20, member, MEMBERS, row, i, CHANNELS, UNIT),
        matrix_entries(table_ptr, 23, member, MEMBERS, row, i, CHANNELS, UNIT),
        matrix_entries(table_ptr, 26, member, MEMBERS, row, i, CHANNELS, UNIT),
        (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], expanded,
        address(table_ptr, 6, member, MEMBERS, like_a_ptr, 1), address(table_ptr, 7, member, MEMBERS, like_a_ptr, 1),
        NESTEROV,
    )  # fmt: skip


# Rows, outputs, inputs, warps and stages, by UNIT. Where it is 1 the epilogue's three sets of 64-bit offsets spill with
# more entries a thread than the default's.
_TILES = {
    "default": dict.fromkeys(UNITS, (32, 64, 64, 8, 3)),
    "small": dict.fromkeys(UNITS, (32, 32, 32, 4, 3)),  # a small layer alone fills no device
    "large": {4: (32, 128, 64, 8, 3), 1: (16, 64, 64, 8, 4)},  # more arithmetic for each factor that is read
}


def _config(name: str, unit: int, nesterov: bool) -> Config:
    rows, outputs, inputs, num_warps, num_stages = _TILES[name][unit]
    blocks = {"BLOCK_R": rows, "BLOCK_O": outputs, "BLOCK_I": inputs}
    return Config(
        kernel=_expand_update_kernel,
        types="*i64 *fp32 *fp32 *fp32 *fp32 i32",
        constants={"UNIT": unit, "NESTEROV": nesterov, "BLOCK_T": MAX_GROUP, **blocks},
        unaligned=("MEMBERS",),
        num_warps=num_warps,
        num_stages=num_stages,
        async_copies=unit > 1,
        name=name,
    )


_EXPAND_UPDATE = {
    (tile, unit, nesterov): _config(tile, unit, nesterov)
    for tile in _TILES
    for unit in UNITS
    for nesterov in (False, True)
}


def _expand_update_(
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
    a, g = ([rows_contiguous(widen(x)) for x in factors] for factors in (a, g))
    w, dampings, settings = ([contiguous(x.float()) for x in numbers] for numbers in (w, dampings, settings))
    states = list(zip(params, momenta, grads, a, g, w, dampings, settings, strict=True))
    keys = [(*(x.dtype for x in state[:3]), unit_of(*state[3:5], *state[:3])) for state in states]
    for (*_, unit), alike in batches(keys):
        launch, members = _EXPAND_UPDATE[config, unit, nesterov], []
        for state in (states[t] for t in alike):
            n, groups, positions, inputs = state[3].shape
            outputs = state[4].shape[3]
            strides = (*state[3].stride()[:3], *state[4].stride()[:3], *(s for x in state[:3] for s in x.stride()))
            sizes = (n, positions, state[0].shape[2], *in_units(unit, inputs, outputs, *strides))
            tiles = groups * cdiv(outputs, launch.block("O")) * cdiv(inputs, launch.block("I"))
            members.append(GroupEntry(state, sizes, tiles))
        launch_group(launch, members, members[0].tensors[:4])


def _update_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    layers, views = example_layers(dtype, device)
    numbers = zip(*(example_numbers(shape[0], device) for shape, _ in EXAMPLE_SHAPES), strict=True)
    return *views, *layers, *map(list, numbers), nesterov


SPECS = (
    KernelSpec(
        name="expand_update_",
        triton_impl=_expand_update_,
        torch_impl=expand_update_torch_,
        examples={name: partial(_update_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda params, momenta, grads, a, g, *_: product_flops(a, g) + 9 * sum(x.numel() for x in params),
        bytes=lambda params, momenta, grads, a, g, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *a, *g),
        configs=(*_EXPAND_UPDATE.values(), TABLE),
        mutates=2,
    ),
)
