# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Project (J v) from explicit rows of J, for all weights in one launch; `expand_rows` has the other product.

Both products read J once and do little arithmetic, so memory traffic bounds their time. They use no tensor cores, and
take half the time with J in half precision.

Dimensions: N samples, K entries of a flat gradient, L Fisher blocks; in a parameter's view O outputs of all groups, T
taps of a convolution's kernel (1 for other layers) and I inputs of a tap.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import define_op, dispatch, expect, last_contiguous, zeros
from .launches import converted, prepared
from .partial_sums import (
    ADD_PARTIAL_SUMS,
    AFTER_PARTIAL_SUMS,
    FIRST_SLOT,
    POSITIONS,
    SAMPLES,
    PartialSums,
    Parts,
)
from .pointer_table import (
    FIRST_TILE,
    MAX_ENTRIES,
    TABLE,
    TABLE_CHANGES,
    Entries,
    address,
    entry_at,
    fields,
    is_aligned,
    launches_of,
    number,
    strides,
)
from .primitives import output_tap_input
from .spec import FLOATING, TRITON_TYPES, KernelSpec, all_configs, cdiv, configs_of, nbytes, normal, tiling, tl, triton
from .update import example_param_dtype, example_parameters

# The kernels are compiled for a J that is aligned to 8 elements (16 bytes in half precision), or to 1.
ROW_UNITS = (8, 1)
_SHORT = 1024  # columns; reading shorter rows takes less than a launch

(
    _J, _V,  # addresses
    _ROW_STRIDE, _COLUMNS,  # stride between the rows of J, and K: both in units of UNIT elements
    _TAPS, _INPUTS,  # T and I of V
    _V_STRIDES,
) = fields(6, strides=1, after=AFTER_PARTIAL_SUMS)  # fmt: skip


@define_op(fake=lambda j, v, blocks, shape, *_: zeros(j[0], *shape))
def project_rows(
    j: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Return y_LN with y = J v, summed over the weights of a block (equation 6; M4).

    With one position, or a few, `project` is faster: the factors are smaller than J.

    Args:
        j: rows [N, K] of each weight, K running over (O, T, I).
        v: the tensors v, as strided views [O, T, I] of the parameters' shapes.
        blocks: the index of each weight's Fisher block.
        shape: [L, N] of the result; a J with fewer rows adds to the first ones.
        config: the launch configuration of the kernel.

    Returns:
        y_LN, in the dtype of ``j``, but in float32 for half precision.

    Raises:
        ValueError: a J does not have one column for each entry of its v, or there is no such launch configuration.
    """
    configs = (PROJECT_ROWS_CONFIGS, config)
    return dispatch(_project_rows, cpu.project_rows, *configs, j, v, blocks, shape, check=_expect_rows)


def _expect_rows(j: list[Tensor], v: list[Tensor], *_: object) -> None:
    for j_NK, v_OTI in zip(j, v, strict=True):
        expect("j_NK", j_NK, j_NK.shape[0], v_OTI.numel())


@triton.jit
def _project_rows_kernel(
    table_ptr, like_j_ptr, like_v_ptr, part_ptr, ENTRIES, WIDTH,
    UNIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """⟨J_n, v⟩ over a chunk of one weight's columns, for BLOCK_R of WIDTH samples; zero beyond the rows of J."""
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
    N = number(table_ptr, SAMPLES, entry, ENTRIES)
    if tl.program_id(1) * BLOCK_R < WIDTH:
        chunk = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
        j_ptr = address(table_ptr, _J, entry, ENTRIES, like_j_ptr, UNIT)
        v_ptr = address(table_ptr, _V, entry, ENTRIES, like_v_ptr, 1)
        stride_jn = number(table_ptr, _ROW_STRIDE, entry, ENTRIES) * UNIT
        K = number(table_ptr, _COLUMNS, entry, ENTRIES) * UNIT
        TAPS, INPUTS = number(table_ptr, _TAPS, entry, ENTRIES), number(table_ptr, _INPUTS, entry, ENTRIES)
        stride_vo = number(table_ptr, _V_STRIDES, entry, ENTRIES)
        stride_vk = number(table_ptr, _V_STRIDES + 1, entry, ENTRIES)
        stride_vi = number(table_ptr, _V_STRIDES + 2, entry, ENTRIES)
        n = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        j_ptr += n.to(tl.int64)[:, None] * stride_jn
        total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        columns = tl.minimum(CHUNK, K - chunk * CHUNK)
        for start in range(0, tl.where(tl.program_id(1) * BLOCK_R < N, columns, 0), BLOCK_K):
            col = chunk * CHUNK + start + tl.arange(0, BLOCK_K)
            o, tap, i = output_tap_input(col, TAPS, INPUTS)
            at = o * stride_vo + tap * stride_vk + i * stride_vi
            v = tl.load(v_ptr + at, mask=col < K, other=0.0).to(tl.float32)
            j = tl.load(j_ptr + col[None, :], mask=(n < N)[:, None] & (col < K)[None, :], other=0.0)
            total += j.to(tl.float32) * v[None, :]
        slot = number(table_ptr, FIRST_SLOT, entry, ENTRIES) + chunk
        tl.store(part_ptr + slot.to(tl.int64) * WIDTH + n, tl.sum(total, 1), mask=n < WIDTH)


_TILINGS = {
    "default": tiling(BLOCK_R=8, BLOCK_K=512, CHUNK=4096),
    "tall": tiling(BLOCK_R=16, BLOCK_K=128, CHUNK=2048),  # more programs for a small J
}
_CONFIGS = {
    (dtype, unit): configs_of(
        _TILINGS,
        _project_rows_kernel,
        f"*i64 {entries} *fp32 *fp32 i32 i32",
        constants={"UNIT": unit, "BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
    )
    for dtype, entries in TRITON_TYPES.items()
    for unit in ROW_UNITS
}
PROJECT_ROWS_CONFIGS = (*all_configs(_CONFIGS), ADD_PARTIAL_SUMS, *TABLE, *TABLE_CHANGES)


def _project_rows(
    j: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    return prepared(_sums, j, v, blocks, shape, config).start()


def _sums(j: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str) -> PartialSums:
    return PartialSums(project_rows_parts(j, v, blocks, config), shape)


def project_rows_parts(j: list[Tensor], v: list[Tensor], blocks: list[int], config: str) -> list[Parts]:
    """Return the launches of `project_rows`."""
    _expect_rows(j, v)
    copies: list[Tensor] = []
    j, launches = converted(last_contiguous, j, copies), []
    keys = [(j_NK.dtype, unit_of_rows(j_NK), v_OTI.dtype) for j_NK, v_OTI in zip(j, v, strict=True)]
    for (dtype, unit, _), indices in launches_of(keys):
        chosen = _CONFIGS[dtype, unit][config]
        entries = Entries((j, v), indices, copies)
        j_, v_ = entries.of(0), entries.of(1)
        columns = {
            SAMPLES: [len(j_NK) for j_NK in j_],
            POSITIONS: [1] * len(indices),
            _ROW_STRIDE: [j_NK.stride(0) // unit for j_NK in j_],
            _COLUMNS: [j_NK.shape[1] // unit for j_NK in j_],
            _TAPS: [v_OTI.shape[1] for v_OTI in v_],
            _INPUTS: [v_OTI.shape[2] for v_OTI in v_],
            **strides(_V_STRIDES, v_),
        }
        chunks = [cdiv(j_NK.shape[1], int(chosen.constants["CHUNK"])) for j_NK in j_]
        own_blocks = [blocks[t] for t in indices]
        launches.append(Parts(chosen, chunks, own_blocks, columns, {_J: 0, _V: 1}, entries, typed=2))
    return launches


def unit_of_rows(j_NK: Tensor) -> int:
    """Return the alignment of J's rows, in elements; 1 for short rows, so that biases of all sizes share a launch."""
    return next(unit for unit in ROW_UNITS if unit == 1 or (j_NK.shape[1] > _SHORT and is_aligned(j_NK, unit)))


def example_rows(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return J of two weights and a bias; the rows of the bias and of one weight are unaligned."""
    return [normal(n, k, dtype=dtype, device=device, seed=k) for n, k in ((50, 4320), (50, 7 * 9 * 10), (33, 5))]


def _example(dtype: torch.dtype, device: torch.device, half: bool) -> tuple[object, ...]:
    param_dtype = example_param_dtype(dtype, half)
    v = [example_parameters(outputs, 9, 10, device, param_dtype)[0] for outputs in (48, 7)]
    return example_rows(dtype, device), [*v, normal(5, 1, 1, dtype=param_dtype, device=device)], [1, 0, 1], [3, 50]


SPECS = (
    KernelSpec(
        name="project_rows",
        triton_impl=_project_rows,
        torch_impl=cpu.project_rows,
        reference=reference.project_rows,
        examples={
            "two weights and a bias": partial(_example, half=False),
            "half-precision parameters": partial(_example, half=True),
        },
        flops=lambda j, v, *_: 2 * sum(j_NK.numel() for j_NK in j),
        bytes=lambda j, v, blocks, shape: nbytes(*j, *v) + 4 * shape[0] * shape[1],
        configs=PROJECT_ROWS_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
)
