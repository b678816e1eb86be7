# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Project (J v) with factored per-sample gradients, all weights in one launch; `expand_factored` has the other product.

With P = 1 the product reads a whole parameter, and that bounds its time; so the arithmetic is float32 for factors and
parameters of any dtype. Half precision is widened on the host: Triton's dot takes operands of one dtype, and for sm_100
Triton 3.7 compiles an ieee dot as a tf32 one if the kernel itself widens an operand.

Dimensions: N samples, G groups, P positions, R pairs of a sample and a position, I inputs and O outputs of a group, L
Fisher blocks; in a parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import define_op, dispatch, last_contiguous, widen, zeros
from .factors import UNITS, example_layers, expect_view, product_flops, sizes_of, unit_of, view_offsets
from .pointer_table import (
    ADD_PARTIAL_SUMS,
    BLOCK,
    FIRST_PART,
    FIRST_TILE,
    MAX_GROUP,
    POSITIONS,
    SAMPLES,
    TABLE,
    add_partial_sums,
    address,
    addresses,
    batches,
    entry_at,
    fields,
    number,
    strided,
    strides,
)
from .spec import KernelSpec, all_configs, cdiv, configs_of, nbytes, tiling, tl, triton
from .update import example_param_dtype

# The fields of a weight: addresses; I of a pixel; and in UNITs I, O, and the strides of a, g and V.
_A, _G, _V, _CHANNELS, _INPUTS, _OUTPUTS, _A_STRIDES, _G_STRIDES, _V_STRIDES = fields(6, strides=3, after=6)


@define_op(fake=lambda a, g, v, blocks, shape, *_: zeros(a[0], *shape))
def project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Return y_LN with y_n = Σ_γp g_nγpᵀ V_γ a_nγp, summed over the weights of a block (equation 6; M4).

    With many positions prefer `sample_grads` once and `project_rows`: this costs 2 N P I O operations each time.

    Args:
        a: inputs [N, G, P, I] of each weight's layer.
        g: output derivatives [N, G, P, O] of each layer.
        v: the tensors V, as strided views [O, K, I] of the parameters' shapes.
        blocks: the Fisher block of each weight.
        shape: [L, N] of the result; a layer with fewer samples adds to the first ones.
        config: the launch configuration of the kernel.

    Returns:
        y_LN, in the dtype of ``a``, but in float32 for half precision.

    Raises:
        ValueError: the shapes of a layer's tensors do not belong together.
    """
    for a_NGPI, g_NGPO, v_OKI in zip(a, g, v, strict=True):
        expect_view("v_OKI", v_OKI, a_NGPI, g_NGPO)
    return dispatch(launch_project, cpu.project, config, a, g, v, blocks, shape)


@triton.jit
def _project_kernel(
    table_ptr, like_ptr, part_ptr, ENTRIES, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """part[slot, (n, p)] = Σ_o g[o] (V a)[o] over one tile of outputs, a chunk of inputs and one group of a weight.

    Where UNIT is not 1, V is a matrix with contiguous rows.
    """
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_T)
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
    # For few samples, or for a small layer alone.
    "small": tiling(BLOCK_R=32, BLOCK_O=32, BLOCK_I=64, CHUNK=256, num_warps=4, num_stages=3),
    # 128 samples read V once.
    "large": tiling(BLOCK_R=128, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=8, num_stages=2),
}
_CONFIGS = {
    unit: configs_of(
        _TILINGS,
        {"UNIT": unit, "BLOCK_T": MAX_GROUP},
        kernel=_project_kernel,
        types="*i64 *fp32 *fp32 i32",
        unaligned=("ENTRIES",),
        async_copies=unit > 1,
    )
    for unit in UNITS
}
PROJECT_CONFIGS = (*all_configs(_CONFIGS), ADD_PARTIAL_SUMS, TABLE)


def launch_project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Launch the kernels of `project`."""
    a, g = ([last_contiguous(widen(x)) for x in factors] for factors in (a, g))
    v = [widen(v_OKI) for v_OKI in v]
    y_LN = zeros(a[0], *shape)
    units = [unit_of(*layer) for layer in zip(a, g, v, strict=True)]
    for unit, indices in batches(units, order=blocks):
        launch = _CONFIGS[unit][config]
        a_, g_, v_ = ([x[t] for t in indices] for x in (a, g, v))
        sizes, chunk = sizes_of(a_, g_), int(launch.constants["CHUNK"])
        slots = [size.groups * cdiv(size.outputs, launch.block("O")) * cdiv(size.inputs, chunk) for size in sizes]
        columns = {
            BLOCK: [blocks[t] for t in indices],
            SAMPLES: [size.samples for size in sizes],
            POSITIONS: [size.positions for size in sizes],
            _A: addresses(a_),
            _G: addresses(g_),
            _V: addresses(v_),
            _CHANNELS: [v_OKI.shape[2] for v_OKI in v_],
            _INPUTS: [size.inputs // unit for size in sizes],
            _OUTPUTS: [size.outputs // unit for size in sizes],
            **strides(_A_STRIDES, a_, unit),
            **strides(_G_STRIDES, g_, unit),
            **strides(_V_STRIDES, v_, unit),
        }
        add_partial_sums(launch, slots, columns, a_[:1], y_LN)
    return y_LN


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
    ),
)
