# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What every step does with explicit per-sample gradients: project (J v), and expand (Jᵀ w) with the update inside.

Each streams J once, and that is its whole cost: plain sums, no tensor cores, and half-precision J at half the price.
All weights of a step go into one launch (see `groups`).

Dimensions: N samples, K entries of a flat gradient, L rows of the result; in a parameter's view O outputs of all
groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from .groups import (
    MOST,
    SUM_PARTS,
    TABLE,
    Member,
    Part,
    add_sums,
    address,
    aligned,
    batches,
    entry,
    launch,
    member_at,
    number,
)
from .spec import (
    TRITON_TYPES,
    Config,
    Constants,
    KernelSpec,
    cdiv,
    contiguous,
    expect,
    nbytes,
    normal,
    rows_contiguous,
    runs_kernel,
    tl,
    triton,
    widen,
)
from .tiles import update_entries, weighted_rows
from .update import example_numbers, example_parameters, expect_update, update_along

_UNITS = (8, 1)  # entries that J's rows begin at multiples of: eight can be read 16 bytes at a time


@custom_op("tengrad_triton::project_rows", mutates_args=())
def project_rows(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    """Return y_LN with y[rows[t]] = Σ_t J_t v_t over the weights of a row; ``shape`` is [L, N], and a shorter J adds to
    the first entries only.

    ``v`` are parameters' strided views [O, K, I], and J's flat entries run over (O, K, I).
    """
    for j_NK, v_OKI in zip(j, v, strict=True):
        expect("j_NK", j_NK, j_NK.shape[0], v_OKI.numel())
    return (_project_rows if runs_kernel(*j, *v) else project_rows_reference)(j, v, rows, shape)


@project_rows.register_fake
def _(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    return j[0].new_empty(shape, dtype=torch.promote_types(j[0].dtype, torch.float32))


def project_rows_reference(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    """y_n = ⟨J_n, v⟩, added up over the weights of a row."""
    y_LN = j[0].new_zeros(shape, dtype=torch.promote_types(j[0].dtype, torch.float32))
    for row, j_NK, v_OKI in zip(rows, j, v, strict=True):
        y_LN[row, : len(j_NK)] += widen(j_NK) @ v_OKI.reshape(-1).to(y_LN.dtype)
    return y_LN


@triton.jit
def _project_rows_kernel(
    table_ptr, like_j_ptr, like_v_ptr, part_ptr, MEMBERS,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """part[chunk, n] = ⟨J_n, v⟩ over a chunk of one member's columns, for BLOCK_R samples.

    Fields: J, v; first tile; row, chunks, N, 1, begin; row stride and columns of J in UNITs, PIXELS, INPUTS; strides of
    v.
    """
    tile = tl.program_id(0)
    member = member_at(table_ptr + 2 * MEMBERS, tile, MEMBERS, BLOCK_T)
    N = number(table_ptr, 5, member, MEMBERS)
    if tl.program_id(1) * BLOCK_R < N:
        chunk = tile - number(table_ptr, 2, member, MEMBERS)
        j_ptr = address(table_ptr, 0, member, MEMBERS, like_j_ptr, UNIT)
        v_ptr = address(table_ptr, 1, member, MEMBERS, like_v_ptr, 1)
        stride_jn = number(table_ptr, 8, member, MEMBERS) * UNIT
        K, PIXELS = number(table_ptr, 9, member, MEMBERS) * UNIT, number(table_ptr, 10, member, MEMBERS)
        INPUTS = number(table_ptr, 11, member, MEMBERS)
        stride_vo, stride_vk = number(table_ptr, 12, member, MEMBERS), number(table_ptr, 13, member, MEMBERS)
        stride_vi = number(table_ptr, 14, member, MEMBERS)
        rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        j_ptr += rows.to(tl.int64)[:, None] * stride_jn
        total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(0, CHUNK, BLOCK_K):
            cols = chunk * CHUNK + start + tl.arange(0, BLOCK_K)
            at = cols // INPUTS // PIXELS * stride_vo + cols // INPUTS % PIXELS * stride_vk + cols % INPUTS * stride_vi
            v = tl.load(v_ptr + at, mask=cols < K, other=0.0).to(tl.float32)
            j = tl.load(j_ptr + cols[None, :], mask=(rows < N)[:, None] & (cols < K)[None, :], other=0.0)
            total += j.to(tl.float32) * v[None, :]
        begin = tl.load(table_ptr + 7 * MEMBERS + member) + chunk.to(tl.int64) * N
        tl.store(part_ptr + begin + rows, tl.sum(total, 1), mask=rows < N)


_PROJECT_TILE: Constants = {"BLOCK_T": MOST, "BLOCK_R": 8, "BLOCK_K": 512, "CHUNK": 4096}
_PROJECT_ROWS = {
    (dtype, unit): Config(
        kernel=_project_rows_kernel,
        types=f"*i64 {entries} *fp32 *fp32 i32",
        constants=_PROJECT_TILE | {"UNIT": unit},
        unaligned=("MEMBERS",),
    )
    for dtype, entries in TRITON_TYPES.items()
    for unit in _UNITS
}


def _project_rows(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    j = [rows_contiguous(j_NK) for j_NK in j]
    y_LN = torch.zeros(shape, dtype=torch.float32, device=j[0].device)
    keys = [(j_NK.dtype, _unit(j_NK), v_OKI.dtype) for j_NK, v_OKI in zip(j, v, strict=True)]
    for (dtype, unit, _), alike in batches(keys, order=rows):
        config, members, parts = _PROJECT_ROWS[dtype, unit], [], []
        for j_NK, v_OKI, row in ((j[t], v[t], rows[t]) for t in alike):
            chunks = cdiv(j_NK.shape[1], int(config.constants["CHUNK"]))
            sizes = (j_NK.stride(0) // unit, j_NK.shape[1] // unit, *v_OKI.shape[1:], *v_OKI.stride())
            members.append(Member((j_NK, v_OKI), sizes, chunks))
            parts.append(Part(row, chunks, j_NK.shape[0], 1))
        add_sums(config, members, parts, members[0].tensors, y_LN)
    return y_LN


def _unit(j_NK: Tensor) -> int:
    return next(unit for unit in _UNITS if aligned(j_NK, unit))


@custom_op("tengrad_triton::expand_rows_update_", mutates_args=("params", "momenta"))
def expand_rows_update_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    j: list[Tensor],
    w: list[Tensor],
    divisors: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
) -> None:
    """Step parameters along (grad − Jᵀ w) / divisor in place; see `update_` for the rest of the rule.

    The parameter-shaped tensors are strided views [O, K, I], over which J's flat entries run.
    """
    for state in zip(params, momenta, grads, j, w, divisors, settings, strict=True):
        expect_update(*state[:3], *state[5:])
        expect("j_NK", state[3], state[4].shape[0], state[0].numel())
    kernel = runs_kernel(*params, *momenta, *grads, *j, *w)
    update = _expand_rows_update_ if kernel else expand_rows_update_reference_
    update(params, momenta, grads, j, w, divisors, settings, nesterov)


def expand_rows_update_reference_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    j: list[Tensor],
    w: list[Tensor],
    divisors: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
) -> None:
    """`update_` along (grad − Jᵀ w) / divisor."""
    for param, momentum, grad, j_NK, w_N, *numbers in zip(
        params, momenta, grads, j, w, divisors, settings, strict=True
    ):
        update_along(param, momentum, grad, widen(w_N) @ widen(j_NK), nesterov, *numbers)


@triton.jit
def _expand_rows_update_kernel(
    table_ptr, like_param_ptr, like_momentum_ptr, like_grad_ptr, like_j_ptr, like_w_ptr, MEMBERS,
    UNIT: tl.constexpr, NESTEROV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The update rule on BLOCK_K entries of one member, counted in the order of J's columns.

    Fields: parameter, momentum, gradient, J, w, divisor, settings; first tile; row stride of J in UNITs, N,
    columns in UNITs, PIXELS, INPUTS, strides of the first three.
    """
    tile = tl.program_id(0)
    member = member_at(table_ptr + 7 * MEMBERS, tile, MEMBERS, BLOCK_T)
    param_ptr = address(table_ptr, 0, member, MEMBERS, like_param_ptr, 1)
    momentum_ptr = address(table_ptr, 1, member, MEMBERS, like_momentum_ptr, 1)
    grad_ptr = address(table_ptr, 2, member, MEMBERS, like_grad_ptr, 1)
    j_ptr = address(table_ptr, 3, member, MEMBERS, like_j_ptr, UNIT)
    w_ptr, divisor_ptr = (
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
        cols < K, expanded, divisor_ptr, settings_ptr, NESTEROV,
    )  # fmt: skip


_EXPAND_ROWS_UPDATE = {
    (dtype, unit, nesterov): Config(
        kernel=_expand_rows_update_kernel,
        types=f"*i64 *fp32 *fp32 *fp32 {entries} *fp32 i32",
        constants={"UNIT": unit, "NESTEROV": nesterov, "BLOCK_T": MOST, "BLOCK_N": 8, "BLOCK_K": 512},
        unaligned=("MEMBERS",),
    )
    for dtype, entries in TRITON_TYPES.items()
    for unit in _UNITS
    for nesterov in (False, True)
}


def _expand_rows_update_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    j: list[Tensor],
    w: list[Tensor],
    divisors: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
) -> None:
    j = [rows_contiguous(j_NK) for j_NK in j]
    w, divisors, settings = ([contiguous(x.float()) for x in numbers] for numbers in (w, divisors, settings))
    states = list(zip(params, momenta, grads, j, w, divisors, settings, strict=True))
    keys = [(*(x.dtype for x in state[:4]), _unit(state[3])) for state in states]
    for (*_, dtype, unit), alike in batches(keys):
        config, members = _EXPAND_ROWS_UPDATE[dtype, unit, nesterov], []
        for state in (states[t] for t in alike):
            n, k = state[3].shape
            strides = (stride for x in state[:3] for stride in x.stride())
            sizes = (state[3].stride(0) // unit, n, k // unit, *state[0].shape[1:], *strides)
            members.append(Member(state, sizes, cdiv(k, config.block("K"))))
        launch(config, members, members[0].tensors[:5])


def _rows(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return J of two weights and a bias, the latter and one of the former with unaligned rows."""
    return [normal(n, k, dtype=dtype, device=device, seed=k) for n, k in ((50, 4320), (50, 7 * 9 * 10), (33, 5))]


def _project_example(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    v = [*example_parameters(48, 9, 10, device)[:1], *example_parameters(7, 9, 10, device)[:1]]
    return _rows(dtype, device), [*v, normal(5, 1, 1, dtype=torch.float32, device=device)], [1, 0, 1], [3, 50]


def _update_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    shapes = ((48, 9, 10), (7, 9, 10), (5, 1, 1))
    states = zip(*(example_parameters(*shape, device) for shape in shapes), strict=True)
    numbers = zip(*(example_numbers(n, device) for n in (50, 50, 33)), strict=True)
    return *map(list, states), _rows(dtype, device), *map(list, numbers), nesterov


SPECS = (
    KernelSpec(
        name="project_rows",
        fast=_project_rows,
        reference=project_rows_reference,
        examples={"two weights and a bias": _project_example},
        flops=lambda j, v, *_: 2 * sum(j_NK.numel() for j_NK in j),
        bytes=lambda j, v, rows, shape: nbytes(*j, *v) + 4 * shape[0] * shape[1],
        configs=(*_PROJECT_ROWS.values(), SUM_PARTS[2], TABLE),
    ),
    KernelSpec(
        name="expand_rows_update_",
        fast=_expand_rows_update_,
        reference=expand_rows_update_reference_,
        examples={name: partial(_update_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda params, momenta, grads, j, *_: sum(2 * x.numel() + 9 * x.shape[1] for x in j),
        bytes=lambda params, momenta, grads, j, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *j),
        configs=(*_EXPAND_ROWS_UPDATE.values(), TABLE),
        mutates=2,
    ),
)
