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

from functools import cache, partial

import torch
from torch import Tensor

from . import cpu, reference
from .dispatch import define_op, dispatch, last_contiguous, widen, widen_contiguous, zeros
from .factors import FACTOR_UNITS, example_factors, example_layers, expect_view, product_flops, sizes_of, unit_of
from .launches import converted, prepared
from .partial_sums import (
    ADD_PARTIAL_SUMS,
    AFTER_PARTIAL_SUMS,
    POSITIONS,
    SAMPLES,
    PartialSums,
    Parts,
    store_partial_sums,
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
    launches_of,
    number,
    strided,
    strides,
)
from .primitives import add_product
from .spec import (
    FLOATING,
    TF32X3,
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
from .update import example_param_dtype, example_parameters

(
    _A, _G, _V,  # addresses of the factors and of V
    _INPUTS, _OUTPUTS,  # inputs (of all taps) and outputs of a group, in units of UNIT elements
    _V_STRIDE,  # between the outputs of V, in units of UNIT elements
    _A_STRIDES, _G_STRIDES,  # of the first three dimensions, in units of UNIT elements
) = fields(6, strides=2, after=AFTER_PARTIAL_SUMS)  # fmt: skip


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
    table_ptr, like_ptr, part_ptr, ENTRIES, WIDTH, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Σ_p g_npᵀ V a_np over one tile of outputs, a chunk of inputs and one group of a weight, for BLOCK_R pairs (n, p).

    The pairs are those of WIDTH samples; beyond those that the weight has, the sums are zero.
    """
    entry = entry_at(table_ptr, tl.program_id(0), ENTRIES, BLOCK_E)
    N, P = number(table_ptr, SAMPLES, entry, ENTRIES), number(table_ptr, POSITIONS, entry, ENTRIES)
    if tl.program_id(1) * BLOCK_R >= WIDTH * P:
        return
    part = tl.program_id(0) - number(table_ptr, FIRST_TILE, entry, ENTRIES)
    INPUTS = number(table_ptr, _INPUTS, entry, ENTRIES) * UNIT
    OUTPUTS = number(table_ptr, _OUTPUTS, entry, ENTRIES) * UNIT
    tiles = tl.cdiv(OUTPUTS, BLOCK_O)
    chunks = tl.cdiv(INPUTS, CHUNK)
    o = part % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    chunk = part // tiles % chunks
    group = part // tiles // chunks
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.where(tl.program_id(1) * BLOCK_R < N * P, tl.minimum(INPUTS - chunk * CHUNK, CHUNK), 0)
    a_ptr = address(table_ptr, _A, entry, ENTRIES, like_ptr, UNIT) + chunk * CHUNK
    v_ptr = address(table_ptr, _V, entry, ENTRIES, like_ptr, UNIT) + chunk * CHUNK
    # Beyond the last pair and the last output these read the last one again; below, g is zero there.
    pair, output = tl.minimum(r, N * P - 1), group * OUTPUTS + tl.minimum(o, OUTPUTS - 1)
    a_ptr += strided(table_ptr, _A_STRIDES, entry, ENTRIES, pair // P, group, pair % P)[:, None] * UNIT
    v_ptr += output.to(tl.int64)[:, None] * (number(table_ptr, _V_STRIDE, entry, ENTRIES) * UNIT)
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, columns, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        a = tl.load(a_ptr + i[None, :], mask=(i < columns)[None, :], other=0.0)
        v = tl.load(v_ptr + i[None, :], mask=(i < columns)[None, :], other=0.0)
        total = add_product(total, a, tl.trans(v), PRECISION)
    g_ptr = address(table_ptr, _G, entry, ENTRIES, like_ptr, UNIT)
    g_ptr += strided(table_ptr, _G_STRIDES, entry, ENTRIES, r // P, group, r % P)[:, None] * UNIT
    g = tl.load(g_ptr + o[None, :], mask=(r < N * P)[:, None] & (o < OUTPUTS)[None, :], other=0.0)
    sums = tl.sum(total * g, 1)
    store_partial_sums(table_ptr, part_ptr, sums, part, entry, tl.program_id(1), ENTRIES, WIDTH, BLOCK_R)


_TILINGS = {
    "default": tiling(BLOCK_R=64, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=4, num_stages=3),
    # For few samples, or for a single small layer.
    "small": tiling(BLOCK_R=32, BLOCK_O=32, BLOCK_I=32, CHUNK=256, num_warps=4, num_stages=3),
    # For many samples: 128 of them share each read of V.
    "large": tiling(BLOCK_R=128, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=8, num_stages=2),
}
_TF32X3 = in_tf32x3(BLOCK_R=64, BLOCK_O=64, BLOCK_I=32, CHUNK=512, num_warps=4, num_stages=3)
_CONFIGS = {
    unit: configs_of(
        _TILINGS | _TF32X3 if unit > 1 else _TILINGS,
        _project_kernel,
        "*i64 *fp32 *fp32 i32 i32",
        constants={"UNIT": unit, "PRECISION": "ieee", "BLOCK_E": MAX_ENTRIES},
        unaligned=("ENTRIES",),
        async_copies=unit > 1,
    )
    for unit in FACTOR_UNITS
}
PROJECT_CONFIGS = (*all_configs(_CONFIGS), ADD_PARTIAL_SUMS, *TABLE, *TABLE_CHANGES)


@cache
def default_config(device: torch.device) -> str:
    """Return the configuration that a device takes by default: `TF32X3` on compute capability 9.0.

    On an H200 that takes 0.22 to 0.28 of the time of float32's own units, with 0.6 to 1.4 times their error, which is
    less than that of torch's products in float32. Gram matrices gain as much but err by up to four times as much as
    torch, so a plan decides on them (see `tuning.precision`). The other products gain nothing.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return TF32X3 if is_hopper else "default"


def launch_project(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str = "default"
) -> Tensor:
    """Launch the kernels of `project`."""
    return prepared(_sums, a, g, v, blocks, shape, config).start()


def _sums(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int], config: str
) -> PartialSums:
    return PartialSums(project_parts(a, g, v, blocks, config), shape)


def project_parts(a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], config: str) -> list[Parts]:
    """Return the launches of `project`."""
    _expect_views(a, g, v)
    copies: list[Tensor] = []
    a, g = (converted(widen_contiguous, factors, copies) for factors in (a, g))
    v, launches = converted(_dense, v, copies), []
    if config == "default":
        config = default_config(a[0].device)
    units = [unit_of(*layer) for layer in zip(a, g, v, strict=True)]
    for unit, indices in launches_of(units):
        chosen = config_named(_CONFIGS[unit], config)
        entries = Entries((a, g, v), indices, copies)
        a_, g_, v_ = map(entries.of, range(3))
        sizes, chunk = sizes_of(a_, g_), int(chosen.constants["CHUNK"])
        parts = [size.groups * cdiv(size.outputs, chosen.block("O")) * cdiv(size.inputs, chunk) for size in sizes]
        columns = {
            SAMPLES: [size.samples for size in sizes],
            POSITIONS: [size.positions for size in sizes],
            _INPUTS: [size.inputs // unit for size in sizes],
            _OUTPUTS: [size.outputs // unit for size in sizes],
            _V_STRIDE: [v_OTI.stride(0) // unit for v_OTI in v_],
            **strides(_A_STRIDES, a_, unit),
            **strides(_G_STRIDES, g_, unit),
        }
        own_blocks = [blocks[t] for t in indices]
        launches.append(Parts(chosen, parts, own_blocks, columns, {_A: 0, _G: 1, _V: 2}, entries, typed=1))
    return launches


def _dense(v_OTI: Tensor) -> Tensor:
    """Return V in float32 with (T, I) as one contiguous dimension.

    In another order than that of the inputs, every entry of V would be a read of its own, by each tile of samples.
    """
    if v_OTI.shape[1] == 1 and v_OTI.stride(2) == 1:
        return widen(v_OTI)
    return last_contiguous(widen(v_OTI).reshape(len(v_OTI), 1, -1))


def _example(dtype: torch.dtype, device: torch.device, half: bool) -> tuple[object, ...]:
    layers, views = example_layers(dtype, device, example_param_dtype(dtype, half))
    return *layers, views[2], [1, 1, 0], [2, 150]


def _positions_example(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    """Return layers of one block whose samples begin and end within tiles, or cover several; one has fewer samples."""
    shapes = ((3, 1, 150, 20, 12), (5, 2, 21, 7, 5))
    a, g = zip(*(example_factors(dtype, device, shape) for shape in shapes), strict=True)
    v = [example_parameters(groups * outputs, 1, inputs, device)[0] for _, groups, _, inputs, outputs in shapes]
    return list(a), list(g), v, [1, 1], [2, 5]


SPECS = (
    KernelSpec(
        name="project",
        triton_impl=launch_project,
        torch_impl=cpu.project,
        reference=reference.project,
        examples={
            "three layers": partial(_example, half=False),
            "half-precision parameters": partial(_example, half=True),
            "many positions": _positions_example,
        },
        flops=lambda a, g, *_: product_flops(a, g),
        bytes=lambda a, g, v, blocks, shape: nbytes(*a, *g, *v) + 4 * shape[0] * shape[1],
        configs=PROJECT_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
)
