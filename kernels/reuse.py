# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The two products that every step takes with factored per-sample gradients: project (J v) and expand (Jᵀ w).

With P = 1 both products read or write a whole parameter and are bound by that, so the arithmetic is float32 whatever
the factors are stored in. They are widened on the host: for sm_100 Triton 3.7 turns an ieee dot into a tf32 one where
the kernel itself widens an operand. With many positions prefer explicit gradients (`reuse_rows`).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, S partial sums; in a parameter's view
O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.library import triton_op

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
from .tiles import load_tile, weighted_outer

_CHUNK = 512  # inputs that one program of project multiplies by: few samples make few tiles, so I is split too


def expect_factors(a_NGPI: Tensor, g_NGPO: Tensor) -> None:
    """Raise ValueError unless inputs and output derivatives belong to the same samples, groups and positions."""
    expect("g_NGPO", g_NGPO, *a_NGPI.shape[:3], g_NGPO.shape[-1])


@triton_op("tengrad_triton::project", mutates_args=())
def project(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """Return y_N = ⟨J_n, V⟩ = Σ_γp g_nγpᵀ V_γ a_nγp (paper, equation 6)."""
    expect_factors(a_NGPI, g_NGPO)
    expect("v_GOI", v_GOI, a_NGPI.shape[1], g_NGPO.shape[3], a_NGPI.shape[3])
    return (_project if runs_kernel(a_NGPI, g_NGPO, v_GOI) else project_reference)(a_NGPI, g_NGPO, v_GOI)


def project_reference(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """y_n = Σ_γp ⟨V_γ a_nγp, g_nγp⟩."""
    return (torch.einsum("ngpi,goi->ngpo", widen(a_NGPI), widen(v_GOI)) * g_NGPO).sum((1, 2, 3))


@triton.jit
def _project_kernel(
    a_ptr, g_ptr, v_ptr, part_ptr, N, P, INPUTS, OUTPUTS,
    stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp, stride_vg, stride_vo,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """part[slot, (n, p)] = Σ_o g[o] (V a)[o] over one tile of outputs, a chunk of inputs and one group."""
    tiles = tl.cdiv(OUTPUTS, BLOCK_O)
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    chunk = tl.program_id(0) // tiles
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(2).to(tl.int64)
    inside = rows < N * P
    n = (rows // P).to(tl.int64)
    p = rows % P
    a_ptr += group * stride_ag + (n * stride_an + p * stride_ap)[:, None]
    g_ptr += group * stride_gg + (n * stride_gn + p * stride_gp)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, CHUNK, BLOCK_I):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK_I)
        a = tl.load(a_ptr + i[None, :], mask=inside[:, None] & (i < INPUTS)[None, :], other=0.0)
        v = load_tile(v_ptr + group * stride_vg, o, i, stride_vo, OUTPUTS, INPUTS)
        total = tl.dot(a, tl.trans(v), total, input_precision="ieee")
    g = tl.load(g_ptr + o[None, :], mask=inside[:, None] & (o < OUTPUTS)[None, :], other=0.0)
    slot = group * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_ptr + slot * (N * P) + rows, tl.sum(total * g, 1), mask=inside)


_PROJECT = Config(
    kernel=_project_kernel,
    types=4 * "*fp32 " + 12 * "i32 ",
    constants={"BLOCK_R": 64, "BLOCK_O": 64, "BLOCK_I": 32, "CHUNK": _CHUNK},
    unaligned=("P",),
    num_stages=3,
    async_copies=True,
)


def _project(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    a_NGPI, g_NGPO, v_GOI = (rows_contiguous(widen(x)) for x in (a_NGPI, g_NGPO, v_GOI))
    n, groups, p, inputs = a_NGPI.shape
    outputs = g_NGPO.shape[3]
    splits = cdiv(outputs, _PROJECT.block("O")) * cdiv(inputs, _CHUNK)
    part_SNP = torch.empty(groups * splits, n, p, dtype=torch.float32, device=a_NGPI.device)
    strides = (*a_NGPI.stride()[:3], *g_NGPO.stride()[:3], *v_GOI.stride()[:2])
    grid = (splits, cdiv(n * p, _PROJECT.block("R")), groups)
    _PROJECT.launch(grid, a_NGPI, g_NGPO, v_GOI, part_SNP, n, p, inputs, outputs, *strides)
    return part_SNP.sum((0, 2))


@triton_op("tengrad_triton::expand", mutates_args=())
def expand(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """Return u_GOI = Σ_n w_n J_n = Σ_np w_n g_np a_npᵀ (paper, equation 7)."""
    expect_factors(a_NGPI, g_NGPO)
    expect("w_N", w_N, a_NGPI.shape[0])
    return (_expand if runs_kernel(a_NGPI, g_NGPO, w_N) else expand_reference)(a_NGPI, g_NGPO, w_N)


def expand_reference(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """U_γ = Σ_np w_n g_nγp a_nγpᵀ."""
    return torch.einsum("ngpo,ngpi->goi", widen(g_NGPO) * w_N[:, None, None, None], widen(a_NGPI))


@triton.jit
def _expand_kernel(
    a_ptr, g_ptr, w_ptr, u_ptr, N, P, INPUTS, OUTPUTS,
    stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_O, BLOCK_I] tile of U in one group."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    group = tl.program_id(2).to(tl.int64)
    expanded = weighted_outer(
        a_ptr, g_ptr, w_ptr, group, o, i, N, P, INPUTS, OUTPUTS,
        stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp, BLOCK_R, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    at = (group * OUTPUTS + o)[:, None] * INPUTS + i[None, :]
    tl.store(u_ptr + at, expanded, mask=(o < OUTPUTS)[:, None] & (i < INPUTS)[None, :])


EXPAND_TILE: Constants = {"BLOCK_R": 32, "BLOCK_O": 64, "BLOCK_I": 64}
_EXPAND = Config(
    kernel=_expand_kernel,
    types=4 * "*fp32 " + 10 * "i32 ",
    constants=EXPAND_TILE,
    unaligned=("P",),
    num_stages=3,
    async_copies=True,
)


def _expand(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    a_NGPI, g_NGPO, w_N = (rows_contiguous(widen(x)) for x in (a_NGPI, g_NGPO, w_N))
    n, groups, p, inputs = a_NGPI.shape
    outputs = g_NGPO.shape[3]
    u_GOI = torch.empty(groups, outputs, inputs, dtype=torch.float32, device=a_NGPI.device)
    strides = (*a_NGPI.stride()[:3], *g_NGPO.stride()[:3])
    grid = (cdiv(outputs, _EXPAND.block("O")), cdiv(inputs, _EXPAND.block("I")), groups)
    _EXPAND.launch(grid, a_NGPI, g_NGPO, w_N, u_GOI, n, p, inputs, outputs, *strides)
    return u_GOI


def factors(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return example factors of a layer for (N, G, P, I, O)."""
    n, groups, p, inputs, outputs = shape
    a_NGPI = normal(n, groups, p, inputs, dtype=dtype, device=device)
    return a_NGPI, normal(n, groups, p, outputs, dtype=dtype, device=device, seed=1)


def _project_example(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    v_GOI = normal(shape[1], shape[4], shape[3], dtype=torch.float32, device=device, seed=2)
    return *factors(dtype, device, shape), v_GOI


def _expand_example(dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return *factors(dtype, device, shape), normal(shape[0], dtype=torch.float32, device=device, seed=2)


_SHAPES = {"one position": (150, 1, 1, 530, 70), "groups and positions": (101, 3, 7, 20, 9)}

SPECS = (
    KernelSpec(
        name="project",
        fast=_project,
        reference=project_reference,
        examples={name: partial(_project_example, shape=shape) for name, shape in _SHAPES.items()},
        flops=lambda a_NGPI, g_NGPO, v_GOI: 2 * a_NGPI.numel() * g_NGPO.shape[3],
        bytes=lambda a_NGPI, g_NGPO, v_GOI: nbytes(a_NGPI, g_NGPO, v_GOI) + 4 * a_NGPI.shape[0],
        configs=(_PROJECT,),
    ),
    KernelSpec(
        name="expand",
        fast=_expand,
        reference=expand_reference,
        examples={name: partial(_expand_example, shape=shape) for name, shape in _SHAPES.items()},
        flops=lambda a_NGPI, g_NGPO, w_N: 2 * a_NGPI.numel() * g_NGPO.shape[3],
        bytes=lambda a_NGPI, g_NGPO, w_N: (
            nbytes(a_NGPI, g_NGPO, w_N) + 4 * a_NGPI.shape[1] * a_NGPI.shape[3] * g_NGPO.shape[3]
        ),
        configs=(_EXPAND,),
    ),
)
