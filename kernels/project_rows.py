# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Project (J v) with explicit per-sample gradients, all weights in one launch; see `reuse_rows_update` for the other.

Each streams J once, and that is its whole cost: plain sums, no tensor cores, and half-precision J at half the price.

Dimensions: N samples, K entries of a flat gradient, L rows of the result; in a parameter's view O outputs of all
groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from .pointer_table import (
    MAX_GROUP,
    SUM_PARTS,
    TABLE,
    GroupEntry,
    Part,
    add_sums,
    address,
    aligned,
    batches,
    member_at,
    number,
)
from .cpu import add_projections_
from .spec import (
    TRITON_TYPES,
    Config,
    Constants,
    KernelSpec,
    cdiv,
    expect,
    nbytes,
    normal,
    rows_contiguous,
    runs_kernel,
    tl,
    triton,
)
from .update import example_parameters

UNITS = (8, 1)  # entries that J's rows begin at multiples of: eight can be read 16 bytes at a time


@custom_op("tengrad_triton::project_rows", mutates_args=())
def project_rows(
    j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Return y_LN with y[rows[t]] = Σ_t J_t v_t over the weights of a row; ``shape`` is [L, N], and a shorter J adds to
    the first entries only.

    ``v`` are parameters' strided views [O, K, I], and J's flat entries run over (O, K, I).
    """
    for j_NK, v_OKI in zip(j, v, strict=True):
        expect("j_NK", j_NK, j_NK.shape[0], v_OKI.numel())
    project = partial(_project_rows, config=config) if runs_kernel(*j, *v) else project_rows_torch
    return project(j, v, rows, shape)


@project_rows.register_fake
def _(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default") -> Tensor:
    return j[0].new_empty(shape, dtype=torch.promote_types(j[0].dtype, torch.float32))


def project_rows_torch(j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    """y_n = ⟨J_n, v⟩, added up over the weights of a row."""
    y_LN = j[0].new_zeros(shape, dtype=torch.promote_types(j[0].dtype, torch.float32))
    add_projections_(y_LN, j, v, rows)
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


_TILES: dict[str, Constants] = {
    "default": {"BLOCK_R": 8, "BLOCK_K": 512, "CHUNK": 4096},
    "tall": {"BLOCK_R": 16, "BLOCK_K": 128, "CHUNK": 2048},
}
_PROJECT_ROWS = {
    (tile, dtype, unit): Config(
        kernel=_project_rows_kernel,
        types=f"*i64 {entries} *fp32 *fp32 i32",
        constants={"UNIT": unit, "BLOCK_T": MAX_GROUP, **constants},
        unaligned=("MEMBERS",),
        name=tile,
    )
    for tile, constants in _TILES.items()
    for dtype, entries in TRITON_TYPES.items()
    for unit in UNITS
}


def _project_rows(
    j: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    j = [rows_contiguous(j_NK) for j_NK in j]
    y_LN = torch.zeros(shape, dtype=torch.float32, device=j[0].device)
    keys = [(j_NK.dtype, unit_of_rows(j_NK), v_OKI.dtype) for j_NK, v_OKI in zip(j, v, strict=True)]
    for (dtype, unit, _), alike in batches(keys, order=rows):
        launch, members, parts = _PROJECT_ROWS[config, dtype, unit], [], []
        for j_NK, v_OKI, row in ((j[t], v[t], rows[t]) for t in alike):
            chunks = cdiv(j_NK.shape[1], int(launch.constants["CHUNK"]))
            sizes = (j_NK.stride(0) // unit, j_NK.shape[1] // unit, *v_OKI.shape[1:], *v_OKI.stride())
            members.append(GroupEntry((j_NK, v_OKI), sizes, chunks))
            parts.append(Part(row, chunks, j_NK.shape[0], 1))
        add_sums(launch, members, parts, members[0].tensors, y_LN)
    return y_LN


def unit_of_rows(j_NK: Tensor) -> int:
    """Return what J's rows are aligned to, in entries."""
    return next(unit for unit in UNITS if aligned(j_NK, unit))


def example_rows(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return J of two weights and a bias, the latter and one of the former with unaligned rows."""
    return [normal(n, k, dtype=dtype, device=device, seed=k) for n, k in ((50, 4320), (50, 7 * 9 * 10), (33, 5))]


def _project_example(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    v = [*example_parameters(48, 9, 10, device)[:1], *example_parameters(7, 9, 10, device)[:1]]
    return example_rows(dtype, device), [*v, normal(5, 1, 1, dtype=torch.float32, device=device)], [1, 0, 1], [3, 50]


SPECS = (
    KernelSpec(
        name="project_rows",
        triton_impl=_project_rows,
        torch_impl=project_rows_torch,
        examples={"two weights and a bias": _project_example},
        flops=lambda j, v, *_: 2 * sum(j_NK.numel() for j_NK in j),
        bytes=lambda j, v, rows, shape: nbytes(*j, *v) + 4 * shape[0] * shape[1],
        configs=(*_PROJECT_ROWS.values(), SUM_PARTS[2], TABLE),
    ),
)
