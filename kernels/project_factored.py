# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Project (J v) with factored per-sample gradients, all weights in one launch; `reuse_update` has the other product.

With P = 1 both products read or write a whole parameter and are bound by that, so the arithmetic is float32 whatever
the factors are stored in. They are widened on the host: for sm_100 Triton 3.7 turns an ieee dot into a tf32 one where
the kernel itself widens an operand. With many positions prefer explicit gradients (`reuse_rows`).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, L rows of the result; in a parameter's
view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    entry,
    member_at,
    number,
)
from .cpu import projected_outer
from .spec import (
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
    widen,
)
from .update import example_parameters

UNITS = (4, 1)  # entries that rows begin at multiples of, in factors and parameters: four are copied at once


def expect_factors(a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless inputs and output derivatives belong to the same samples, groups and positions."""
    expect("g_NGPO", g_NGPO, *a_NGPI.shape[:3], g_NGPO.shape[-1])


def expect_view(name: str, x_OKI: Tensor, a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless a parameter's view belongs to these factors."""
    expect_factors(a_NGPI, g_NGPO)
    _, pixels, inputs = x_OKI.shape
    expect("a_NGPI", a_NGPI, *a_NGPI.shape[:3], pixels * inputs)
    expect(name, x_OKI, g_NGPO.shape[1] * g_NGPO.shape[3], pixels, inputs)


@custom_op("tengrad_triton::project", mutates_args=())
def project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Return y_LN with y[rows[t], n] = Σ_tγp g_nγpᵀ V_γ a_nγp over the weights of a row (paper, equation 6).

    ``v`` are parameters' strided views [O, K, I]; ``shape`` is [L, N].
    """
    for a_NGPI, g_NGPO, v_OKI in zip(a, g, v, strict=True):
        expect_view("v_OKI", v_OKI, a_NGPI, g_NGPO)
    return (partial(_project, config=config) if runs_kernel(*a, *g, *v) else project_torch)(a, g, v, rows, shape)


@project.register_fake
def _(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    return a[0].new_empty(shape, dtype=torch.promote_types(a[0].dtype, torch.float32))


def project_torch(a: list[Tensor], g: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int]) -> Tensor:
    """y_n = Σ_γp ⟨V_γ a_nγp, g_nγp⟩, added up over the weights of a row."""
    y_LN = a[0].new_zeros(shape, dtype=torch.promote_types(a[0].dtype, torch.float32))
    y = y_LN.unbind()
    for row, a_NGPI, g_NGPO, v_OKI in zip(rows, a, g, v, strict=True):
        v_GOI = v_OKI.reshape(g_NGPO.shape[1], g_NGPO.shape[3], -1).to(y_LN.dtype)
        y[row][: len(a_NGPI)].add_(projected_outer(widen(a_NGPI), g_NGPO, v_GOI))
    return y_LN


@triton.jit
def _project_kernel(
    table_ptr, like_a_ptr, like_g_ptr, like_v_ptr, part_ptr, MEMBERS, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """part[slot, (n, p)] = Σ_o g[o] (V a)[o] over one tile of outputs, a chunk of inputs and one group of a member.

    Fields: a, g, V; first slot; row, slots, N, P, begin; CHANNELS; in UNITs INPUTS, OUTPUTS, the strides of a and g but
    the last, and those of V. Where UNIT is not 1, V is a matrix with contiguous rows.
    """
    tile = tl.program_id(0)
    member = member_at(table_ptr + 3 * MEMBERS, tile, MEMBERS, BLOCK_T)
    N, P = number(table_ptr, 6, member, MEMBERS), number(table_ptr, 7, member, MEMBERS)
    if tl.program_id(1) * BLOCK_R < N * P:
        slot = tile - number(table_ptr, 3, member, MEMBERS)
        CHANNELS = number(table_ptr, 9, member, MEMBERS)
        INPUTS = number(table_ptr, 10, member, MEMBERS) * UNIT
        OUTPUTS = number(table_ptr, 11, member, MEMBERS) * UNIT
        tiles = tl.cdiv(OUTPUTS, BLOCK_O)
        chunks = tl.cdiv(INPUTS, CHUNK)
        o = slot % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
        chunk = slot // tiles % chunks
        group = slot // tiles // chunks
        rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = rows < N * P
        a_ptr = address(table_ptr, 0, member, MEMBERS, like_a_ptr, UNIT)
        g_ptr = address(table_ptr, 1, member, MEMBERS, like_g_ptr, UNIT)
        v_ptr = address(table_ptr, 2, member, MEMBERS, like_v_ptr, UNIT)
        a_ptr += entry(table_ptr, 12, member, MEMBERS, rows // P, group, rows % P)[:, None] * UNIT
        g_ptr += entry(table_ptr, 15, member, MEMBERS, rows // P, group, rows % P)[:, None] * UNIT
        total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
        for start in range(0, CHUNK, BLOCK_I):
            i = chunk * CHUNK + start + tl.arange(0, BLOCK_I)
            a = tl.load(a_ptr + i[None, :], mask=inside[:, None] & (i < INPUTS)[None, :], other=0.0)
            v_at = matrix_entries(table_ptr, 18, member, MEMBERS, group * OUTPUTS + o, i, CHANNELS, UNIT)
            v = tl.load(v_ptr + v_at, mask=(o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], other=0.0)
            total = tl.dot(a, tl.trans(v), total, input_precision="ieee")
        g = tl.load(g_ptr + o[None, :], mask=inside[:, None] & (o < OUTPUTS)[None, :], other=0.0)
        begin = tl.load(table_ptr + 8 * MEMBERS + member) + slot.to(tl.int64) * (N * P)
        tl.store(part_ptr + begin + rows, tl.sum(total * g, 1), mask=inside)


@triton.jit
def matrix_entries(table_ptr, field, member, MEMBERS, o, i, CHANNELS, UNIT: tl.constexpr):
    """Where the entries [o, i] of a parameter-shaped tensor lie."""
    if UNIT == 1:
        at = entry(table_ptr, field, member, MEMBERS, o[:, None], i[None, :] // CHANNELS, i[None, :] % CHANNELS)
    else:
        at = o.to(tl.int64)[:, None] * (tl.load(table_ptr + field * MEMBERS + member) * UNIT) + i[None, :]
    return at


_TILES: dict[str, tuple[Constants, int, int]] = {  # with warps and stages
    "default": ({"BLOCK_R": 64, "BLOCK_O": 64, "BLOCK_I": 32, "CHUNK": 512}, 4, 3),
    "small": ({"BLOCK_R": 32, "BLOCK_O": 32, "BLOCK_I": 64, "CHUNK": 256}, 4, 3),  # few samples, or a small layer alone
    "large": ({"BLOCK_R": 128, "BLOCK_O": 64, "BLOCK_I": 32, "CHUNK": 512}, 8, 2),  # 128 samples read V once
}
_PROJECT = {
    (tile, unit): Config(
        kernel=_project_kernel,
        types="*i64 *fp32 *fp32 *fp32 *fp32 i32",
        constants={"UNIT": unit, "BLOCK_T": MAX_GROUP, **constants},
        unaligned=("MEMBERS",),
        num_warps=num_warps,
        num_stages=num_stages,
        async_copies=unit > 1,
        name=tile,
    )
    for tile, (constants, num_warps, num_stages) in _TILES.items()
    for unit in UNITS
}


def unit_of(a_NGPI: Tensor, g_NGPO: Tensor, *views: Tensor) -> int:
    """Return what factors are aligned to, and parameters' views too if these are matrices with contiguous rows."""
    unit = next(unit for unit in UNITS if aligned(a_NGPI, unit) and aligned(g_NGPO, unit))
    dense = all(
        x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) and x.stride(0) % unit == 0
        and x.storage_offset() % unit == 0
        for x in views
    )  # fmt: skip
    return unit if dense else 1


def in_units(unit: int, *entries: int) -> list[int]:
    """Return sizes and distances in units of so many entries."""
    return [count // unit for count in entries]


def _project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], rows: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    a, g = ([rows_contiguous(widen(x)) for x in factors] for factors in (a, g))
    y_LN = torch.zeros(shape, dtype=torch.float32, device=a[0].device)
    keys = [(v_OKI.dtype, unit_of(*factors, v_OKI)) for *factors, v_OKI in zip(a, g, v, strict=True)]
    for (_, unit), alike in batches(keys, order=rows):
        launch, members, parts = _PROJECT[config, unit], [], []
        for row, a_NGPI, g_NGPO, v_OKI in ((rows[t], a[t], g[t], v[t]) for t in alike):
            n, groups, positions, inputs = a_NGPI.shape
            outputs = g_NGPO.shape[3]
            slots = groups * cdiv(outputs, launch.block("O")) * cdiv(inputs, int(launch.constants["CHUNK"]))
            strides = (*a_NGPI.stride()[:3], *g_NGPO.stride()[:3], *v_OKI.stride())
            sizes = (v_OKI.shape[2], *in_units(unit, inputs, outputs, *strides))
            members.append(GroupEntry((a_NGPI, g_NGPO, v_OKI), sizes, slots))
            parts.append(Part(row, slots, n, positions))
        add_sums(launch, members, parts, members[0].tensors, y_LN)
    return y_LN


def factors(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return example factors of a layer for (N, G, P, I, O)."""
    n, groups, p, inputs, outputs = shape
    a_NGPI = normal(n, groups, p, inputs, dtype=dtype, device=device)
    return a_NGPI, normal(n, groups, p, outputs, dtype=dtype, device=device, seed=1)


# (N, G, P, I, O) and the kernel's pixels of some layers: aligned, unaligned, with groups and positions.
EXAMPLE_SHAPES = (((150, 1, 1, 532, 72), 1), ((150, 1, 1, 30, 9), 1), ((101, 2, 7, 9 * 10, 70), 9))


def example_layers(dtype: torch.dtype, device: torch.device) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return (a, g), and (parameters, momenta, gradients), of some layers."""
    layers = [factors(dtype, device, shape) for shape, _ in EXAMPLE_SHAPES]
    views = [
        example_parameters(groups * outputs, pixels, inputs // pixels, device)
        for (_, groups, _, inputs, outputs), pixels in EXAMPLE_SHAPES
    ]
    return [list(x) for x in zip(*layers, strict=True)], [list(x) for x in zip(*views, strict=True)]


def _project_example(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    layers, views = example_layers(dtype, device)
    return *layers, views[2], [1, 1, 0], [2, 150]


def product_flops(a: Sequence[Tensor], g: Sequence[Tensor]) -> int:
    """Return the cost of one product with J."""
    return sum(2 * a_NGPI.numel() * g_NGPO.shape[3] for a_NGPI, g_NGPO in zip(a, g, strict=True))


SPECS = (
    KernelSpec(
        name="project",
        triton_impl=_project,
        torch_impl=project_torch,
        examples={"three layers": _project_example},
        flops=lambda a, g, *_: product_flops(a, g),
        bytes=lambda a, g, v, rows, shape: nbytes(*a, *g, *v) + 4 * shape[0] * shape[1],
        configs=(*_PROJECT.values(), SUM_PARTS[3], TABLE),
    ),
)
