# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Project (J v) from factors, for all weights in one launch; `expand_factored` has the other product.

With P = 1, reading the parameter takes most of the time, so half-precision arithmetic would save little: the kernel
computes in float32 for factors and parameters of any dtype. They are widened before the launch, for two reasons:
Triton's dot takes operands of one dtype; and Triton 3.7 compiles an ieee dot for sm_100 as a tf32 dot if the kernel
itself widens an operand.

Dimensions: N samples, G groups, P positions, R pairs of a sample and a position, I inputs and O outputs of a group, L
Fisher blocks; in a parameter's view O outputs of all groups, T taps of a convolution's kernel (1 for other layers) and
I inputs of a tap.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import define_op, dispatch, widen, widen_contiguous, zeros
from .factors import FACTOR_UNITS, example_layers, expect_view, product_flops, sizes_of, unit_of, view_offsets
from .launches import PartialSums, converted, partial_sums, prepared
from .pointer_table import (
    ADD_PARTIAL_SUMS,
    AFTER_PARTIAL_SUMS,
    FIRST_PART,
    FIRST_TILE,
    FISHER_BLOCK,
    MAX_ENTRIES,
    POSITIONS,
    SAMPLES,
    TABLE,
    Entries,
    address,
    entry_at,
    fields,
    launches_of,
    number,
    strided,
    strides,
)
from .spec import FLOATING, KernelSpec, all_configs, cdiv, configs_of, nbytes, tiling, tl, triton
from .update import example_param_dtype

(
    _A, _G, _V,  # addresses of the factors and of V
    _CHANNELS,  # inputs of a tap
    _INPUTS, _OUTPUTS,  # inputs (of all taps) and outputs of a group, in units of UNIT elements
    _A_STRIDES, _G_STRIDES, _V_STRIDES,  # of the first three dimensions, in units of UNIT elements
) = fields(6, strides=3, after=AFTER_PARTIAL_SUMS)  # fmt: skip


@define_op(fake=lambda a, g, v, blocks, shape, *_: zeros(a[0], *shape))
def project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Return y_LN with y_n = Σ_γp g_nγpᵀ V_γ a_nγp, summed over the weights of a block (equation 6; M4).

    With many positions, `sample_grads` once and `project_rows` in every step are faster: this op takes 2 N P I O
    operations in every step.

    Args:
        a: inputs [N, G, P, I] of each weight's layer.
        g: output gradients [N, G, P, O] of each layer.
        v: the tensors V, as strided views [O, T, I] of the parameters' shapes.
        blocks: the index of each weight's Fisher block.
        shape: [L, N] of the result; a layer with fewer samples adds to the first ones.
        config: the launch configuration of the kernel.

    Returns:
        y_LN, in the dtype of ``a``, but in float32 for half precision.

    Raises:
        ValueError: the shapes of a layer's tensors do not belong together, or there is no such launch configuration.
    """
    configs = (PROJECT_CONFIGS, config)
    return dispatch(launch_project, cpu.project, *configs, a, g, v, blocks, shape, check=_expect_views)


def _expect_views(a: list[Tensor], g: list[Tensor], v: list[Tensor], *_: object) -> None:
    for a_NGPI, g_NGPO, v_OTI in zip(a, g, v, strict=True):
        expect_view("v_OTI", v_OTI, a_NGPI, g_NGPO)


@triton.jit
def _project_kernel(
    table_ptr, like_ptr, part_ptr, ENTRIES, UNIT: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """part[slot, (n, p)] = Σ_o g[o] (V a)[o] over one tile of outputs, a chunk of inputs and one group of a weight.

    If UNIT is not 1, each output's part of V is contiguous.
    """
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
    N, P = number(table_ptr, SAMPLES, entry, ENTRIES), number(table_ptr, POSITIONS, entry, ENTRIES)
    if tl.program_id(1) * BLOCK_R < N * P:
        slot = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
        CHANNELS = number(table_ptr, _CHANNELS, entry, ENTRIES)
        INPUTS = number(table_ptr, _INPUTS, entry, ENTRIES) * UNIT
        OUTPUTS = number(table_ptr, _OUTPUTS, entry, ENTRIES) * UNIT
        tiles = tl.cdiv(OUTPUTS, BLOCK_O)
        chunks = tl.cdiv(INPUTS, CHUNK)
        o = slot % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
        chunk = slot // tiles % chunks
        group = slot // tiles // chunks
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = r < N * P
        a_ptr = address(table_ptr, _A, entry, ENTRIES, like_ptr, UNIT)
        g_ptr = address(table_ptr, _G, entry, ENTRIES, like_ptr, UNIT)
        v_ptr = address(table_ptr, _V, entry, ENTRIES, like_ptr, UNIT)
        a_ptr += strided(table_ptr, _A_STRIDES, entry, ENTRIES, r // P, group, r % P)[:, None] * UNIT
        g_ptr += strided(table_ptr, _G_STRIDES, entry, ENTRIES, r // P, group, r % P)[:, None] * UNIT
        total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
        for start in range(0, CHUNK, BLOCK_I):
            i = chunk * CHUNK + start + tl.arange(0, BLOCK_I)
            a = tl.load(a_ptr + i[None, :], mask=inside[:, None] & (i < INPUTS)[None, :], other=0.0)
            v_at = view_offsets(table_ptr, _V_STRIDES, entry, ENTRIES, group * OUTPUTS + o, i, CHANNELS, UNIT)
            v = tl.load(v_ptr + v_at, mask=(o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], other=0.0)
            total = tl.dot(a, tl.trans(v), total, input_precision="ieee")
        g = tl.load(g_ptr + o[None, :], mask=inside[:, None] & (o < OUTPUTS)[None, :], other=0.0)
        first = tl.load(table_ptr + ENTRIES * FIRST_PART + entry) + slot.to(tl.int64) * (N * P)
        tl.store(part_ptr + first + r, tl.sum(total * g, 1), mask=inside)


_TILINGS = {
    "default": tiling(BLOCK_R=64, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=4, num_stages=3),
    # For few samples, or for a single small layer.
    "small": tiling(BLOCK_R=32, BLOCK_O=32, BLOCK_I=64, CHUNK=256, num_warps=4, num_stages=3),
    # For many samples: 128 of them share each read of V.
    "large": tiling(BLOCK_R=128, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=8, num_stages=2),
}
_CONFIGS = {
    unit: configs_of(
        _TILINGS,
        _project_kernel,
        "*i64 *fp32 *fp32 i32",
        constants={"UNIT": unit, "BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
        async_copies=unit > 1,
    )
    for unit in FACTOR_UNITS
}
PROJECT_CONFIGS = (*all_configs(_CONFIGS), ADD_PARTIAL_SUMS, *TABLE)


def launch_project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Launch the kernels of `project`."""
    y_LN = zeros(a[0], *shape)
    for launch in prepared(_launches, a, g, v, blocks, shape, config):
        launch.add_to(y_LN)
    return y_LN


def _launches(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str
) -> list[PartialSums]:
    _expect_views(a, g, v)
    copies: list[Tensor] = []
    a, g = (converted(widen_contiguous, factors, copies) for factors in (a, g))
    v, launches = converted(widen, v, copies), []
    units = [unit_of(*layer) for layer in zip(a, g, v, strict=True)]
    for unit, indices in launches_of(units, order=blocks):
        chosen = _CONFIGS[unit][config]
        entries = Entries((a, g, v), indices, copies)
        a_, g_, v_ = map(entries.of, range(3))
        sizes, chunk = sizes_of(a_, g_), int(chosen.constants["CHUNK"])
        slots = [size.groups * cdiv(size.outputs, chosen.block("O")) * cdiv(size.inputs, chunk) for size in sizes]
        columns = {
            FISHER_BLOCK: [blocks[t] for t in indices],
            SAMPLES: [size.samples for size in sizes],
            POSITIONS: [size.positions for size in sizes],
            _CHANNELS: [v_OTI.shape[2] for v_OTI in v_],
            _INPUTS: [size.inputs // unit for size in sizes],
            _OUTPUTS: [size.outputs // unit for size in sizes],
            **strides(_A_STRIDES, a_, unit),
            **strides(_G_STRIDES, g_, unit),
            **strides(_V_STRIDES, v_, unit),
        }
        launches.append(partial_sums(chosen, slots, columns, {_A: 0, _G: 1, _V: 2}, entries, typed=1))
    return launches


def _example(dtype: torch.dtype, device: torch.device, half: bool) -> tuple[object, ...]:
    layers, views = example_layers(dtype, device, example_param_dtype(dtype, half))
    return *layers, views[2], [1, 1, 0], [2, 150]


SPECS = (
    KernelSpec(
        name="project",
        triton_impl=launch_project,
        torch_impl=cpu.project,
        reference=reference.project,
        examples={
            "three layers": partial(_example, half=False),
            "half-precision parameters": partial(_example, half=True),
        },
        flops=lambda a, g, *_: product_flops(a, g),
        bytes=lambda a, g, v, blocks, shape: nbytes(*a, *g, *v) + 4 * shape[0] * shape[1],
        configs=PROJECT_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
)
