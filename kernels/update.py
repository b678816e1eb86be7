# ruff: noqa: ANN001, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The parameter update, alone or in the epilogue of expand, so that a step reads and writes a parameter once.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient; in a
parameter's view O outputs of all groups, K kernel pixels and I inputs of a pixel.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import triton_op

from .reuse import EXPAND_TILE, expand_reference, expect_factors, factors
from .reuse_rows import EXPAND_ROWS_TILE, expand_rows_reference
from .spec import (
    TRITON_TYPES,
    Config,
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
from .tiles import update_entries, weighted_outer, weighted_rows


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """The update rule, in place: coupled weight decay, then momentum, then the step; θ shrinks first if decoupled.

    d = direction + weight_decay θ;  m ← momentum m + d;  θ ← (1 − lr shrink) θ − lr (m, or d + momentum m if Nesterov)
    with ``settings = [lr, momentum, weight_decay, shrink]`` as one tensor, so that a schedule recompiles nothing.
    """
    lr, momentum, weight_decay, shrink = settings.unbind()
    # All in place: on a CPU a temporary of the parameter's size costs more than the arithmetic, five times measured.
    momentum_buffer.mul_(momentum).add_(direction).addcmul_(param, weight_decay)
    if nesterov:
        param.mul_(1 - lr * (shrink + weight_decay)).addcmul_(direction, -lr).addcmul_(momentum_buffer, -lr * momentum)
    else:
        param.mul_(1 - lr * shrink).addcmul_(momentum_buffer, -lr)


def _direction(expanded_OKI: Tensor, grad_OKI: Tensor, divisor: Tensor) -> Tensor:
    """(grad − expanded) / divisor, lying in memory as the gradient does, or arithmetic on the two would crawl."""
    if expanded_OKI.stride() == grad_OKI.stride():
        return expanded_OKI.sub_(grad_OKI).div_(-divisor)
    return (grad_OKI - expanded_OKI).div_(divisor)


def _expect_update(param: Tensor, momentum_buffer: Tensor, grad: Tensor, divisor: Tensor, settings: Tensor) -> None:
    expect("momentum_OKI", momentum_buffer, *param.shape)
    expect("grad_OKI", grad, *param.shape)
    expect("divisor", divisor)
    expect("settings", settings, 4)


@triton_op("tengrad_triton::expand_update_", mutates_args=("param_OKI", "momentum_OKI"))
def expand_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    a_NGPI: Tensor,
    g_NGPO: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """Step a parameter along (grad − Σ_n w_n J_n) / divisor in place; see `update_` for the rest of the rule.

    The three parameter-shaped tensors are strided views with O running over all groups and (K, I) over the canonical
    form's inputs: for a convolution K is the kernel's pixels and I its channels, for everything else K is 1.
    """
    _expect_update(param_OKI, momentum_OKI, grad_OKI, divisor, settings)
    expect_factors(a_NGPI, g_NGPO)
    expect("w_N", w_N, a_NGPI.shape[0])
    outputs, pixels, inputs = param_OKI.shape
    expect("a_NGPI", a_NGPI, *a_NGPI.shape[:3], pixels * inputs)
    expect("g_NGPO", g_NGPO, *g_NGPO.shape[:3], outputs // g_NGPO.shape[1])
    tensors = (param_OKI, momentum_OKI, grad_OKI, a_NGPI, g_NGPO, w_N)
    update = _expand_update_ if runs_kernel(*tensors) else expand_update_reference_
    update(param_OKI, momentum_OKI, grad_OKI, a_NGPI, g_NGPO, w_N, divisor, settings, nesterov)


def expand_update_reference_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    a_NGPI: Tensor,
    g_NGPO: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """`update_` along (grad − expand(a, g, w)) / divisor."""
    expanded_OKI = expand_reference(a_NGPI, g_NGPO, w_N).reshape(param_OKI.shape)
    update_(param_OKI, momentum_OKI, _direction(expanded_OKI, grad_OKI, divisor), settings, nesterov)


@triton.jit
def _expand_update_kernel(
    param_ptr, momentum_ptr, grad_ptr, a_ptr, g_ptr, w_ptr, divisor_ptr, settings_ptr, N, P, INPUTS, OUTPUTS, CHANNELS,
    stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp,
    stride_po, stride_pk, stride_pi, stride_mo, stride_mk, stride_mi, stride_do, stride_dk, stride_di,
    NESTEROV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The update rule on one [BLOCK_O, BLOCK_I] tile of one group; stride_d* belong to grad."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    group = tl.program_id(2).to(tl.int64)
    expanded = weighted_outer(
        a_ptr, g_ptr, w_ptr, group, o, i, N, P, INPUTS, OUTPUTS,
        stride_an, stride_ag, stride_ap, stride_gn, stride_gg, stride_gp, BLOCK_R, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    row = (group * OUTPUTS + o)[:, None]
    pixel = (i // CHANNELS)[None, :].to(tl.int64)
    channel = (i % CHANNELS)[None, :].to(tl.int64)
    update_entries(
        param_ptr, momentum_ptr, grad_ptr, row * stride_po + pixel * stride_pk + channel * stride_pi,
        row * stride_mo + pixel * stride_mk + channel * stride_mi,
        row * stride_do + pixel * stride_dk + channel * stride_di,
        (o < OUTPUTS)[:, None] & (i < INPUTS)[None, :], expanded, divisor_ptr, settings_ptr, NESTEROV,
    )  # fmt: skip


_EXPAND_UPDATE = {
    nesterov: Config(
        kernel=_expand_update_kernel,
        types=8 * "*fp32 " + 20 * "i32 ",
        constants=EXPAND_TILE | {"NESTEROV": nesterov},
        unaligned=("P", "stride_pi", "stride_mi", "stride_di"),
        num_warps=8,  # the epilogue's three sets of 64-bit offsets spill with 4
        num_stages=3,
        async_copies=True,
    )
    for nesterov in (False, True)
}


def _expand_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    a_NGPI: Tensor,
    g_NGPO: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    a_NGPI, g_NGPO, w_N = (rows_contiguous(widen(x)) for x in (a_NGPI, g_NGPO, w_N))
    n, groups, p, inputs = a_NGPI.shape
    outputs = g_NGPO.shape[3]
    config = _EXPAND_UPDATE[nesterov]
    tensors = (param_OKI, momentum_OKI, grad_OKI, a_NGPI, g_NGPO, w_N, divisor, contiguous(settings))
    sizes = (n, p, inputs, outputs, param_OKI.shape[2], *a_NGPI.stride()[:3], *g_NGPO.stride()[:3])
    strides = (*param_OKI.stride(), *momentum_OKI.stride(), *grad_OKI.stride())
    grid = (cdiv(outputs, config.block("O")), cdiv(inputs, config.block("I")), groups)
    config.launch(grid, *tensors, *sizes, *strides)


@triton_op("tengrad_triton::expand_rows_update_", mutates_args=("param_OKI", "momentum_OKI"))
def expand_rows_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    j_NK: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """Like `expand_update_`, from explicit per-sample gradients whose flat entries run over (O, K, I)."""
    _expect_update(param_OKI, momentum_OKI, grad_OKI, divisor, settings)
    expect("j_NK", j_NK, w_N.shape[0], param_OKI.numel())
    tensors = (param_OKI, momentum_OKI, grad_OKI, j_NK, w_N)
    update = _expand_rows_update_ if runs_kernel(*tensors) else expand_rows_update_reference_
    update(param_OKI, momentum_OKI, grad_OKI, j_NK, w_N, divisor, settings, nesterov)


def expand_rows_update_reference_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    j_NK: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """`update_` along (grad − Jᵀ w) / divisor."""
    expanded_OKI = expand_rows_reference(j_NK, w_N).reshape(param_OKI.shape)
    update_(param_OKI, momentum_OKI, _direction(expanded_OKI, grad_OKI, divisor), settings, nesterov)


@triton.jit
def _expand_rows_update_kernel(
    param_ptr, momentum_ptr, grad_ptr, j_ptr, w_ptr, divisor_ptr, settings_ptr, N, K, PIXELS, INPUTS, stride_jn,
    stride_po, stride_pk, stride_pi, stride_mo, stride_mk, stride_mi, stride_do, stride_dk, stride_di,
    NESTEROV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The update rule on BLOCK_K entries of a parameter, counted in the order of J's columns."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    expanded = weighted_rows(j_ptr, w_ptr, cols, N, K, stride_jn, BLOCK_N, BLOCK_K)
    o = cols // INPUTS // PIXELS
    pixel = cols // INPUTS % PIXELS
    i = cols % INPUTS
    update_entries(
        param_ptr, momentum_ptr, grad_ptr, o * stride_po + pixel * stride_pk + i * stride_pi,
        o * stride_mo + pixel * stride_mk + i * stride_mi, o * stride_do + pixel * stride_dk + i * stride_di,
        cols < K, expanded, divisor_ptr, settings_ptr, NESTEROV,
    )  # fmt: skip


_EXPAND_ROWS_UPDATE = {
    (dtype, nesterov): Config(
        kernel=_expand_rows_update_kernel,
        types=f"*fp32 *fp32 *fp32 {entries} *fp32 *fp32 *fp32 " + 14 * "i32 ",
        constants=EXPAND_ROWS_TILE | {"NESTEROV": nesterov},
        unaligned=("PIXELS", "stride_pi", "stride_mi", "stride_di"),
    )
    for dtype, entries in TRITON_TYPES.items()
    for nesterov in (False, True)
}


def _expand_rows_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    j_NK: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    j_NK, w_N = rows_contiguous(j_NK), contiguous(w_N.float())
    config = _EXPAND_ROWS_UPDATE[j_NK.dtype, nesterov]
    tensors = (param_OKI, momentum_OKI, grad_OKI, j_NK, w_N, divisor, contiguous(settings))
    strides = (*param_OKI.stride(), *momentum_OKI.stride(), *grad_OKI.stride())
    sizes = (*j_NK.shape, *param_OKI.shape[1:], j_NK.stride(0))
    config.launch((cdiv(j_NK.shape[1], config.block("K")),), *tensors, *sizes, *strides)


def _parameters(o: int, k: int, i: int, device: torch.device) -> list[Tensor]:
    tensors = [normal(o, i, k, dtype=torch.float32, device=device, seed=seed) for seed in (3, 4, 5)]
    return [x_OIK.mT for x_OIK in tensors]  # as a convolution's weight comes


def _numbers(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    w_N = normal(n, dtype=torch.float32, device=device, seed=6)
    return w_N, torch.tensor(0.3, device=device), torch.tensor([0.1, 0.9, 0.01, 0.02], device=device)


def _factored_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    a_NGPI, g_NGPO = factors(dtype, device, (11, 2, 7, 9 * 10, 70))
    return *_parameters(2 * 70, 9, 10, device), a_NGPI, g_NGPO, *_numbers(11, device), nesterov


def _rows_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    j_NK = normal(50, 7 * 9 * 10, dtype=dtype, device=device)
    return *_parameters(7, 9, 10, device), j_NK, *_numbers(50, device), nesterov


SPECS = (
    KernelSpec(
        name="expand_update_",
        fast=_expand_update_,
        reference=expand_update_reference_,
        examples={name: partial(_factored_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda param, momentum, grad, a_NGPI, g_NGPO, *_: (
            2 * a_NGPI.numel() * g_NGPO.shape[3] + 9 * param.numel()
        ),
        bytes=lambda param, momentum, grad, a, g, *_: 2 * nbytes(param, momentum) + nbytes(grad, a, g),
        configs=tuple(_EXPAND_UPDATE.values()),
        mutates=2,
    ),
    KernelSpec(
        name="expand_rows_update_",
        fast=_expand_rows_update_,
        reference=expand_rows_update_reference_,
        examples={name: partial(_rows_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda param, momentum, grad, j, *_: 2 * j.numel() + 9 * param.numel(),
        bytes=lambda param, momentum, grad, j, *_: 2 * nbytes(param, momentum) + nbytes(grad, j),
        configs=tuple(_EXPAND_ROWS_UPDATE.values()),
        mutates=2,
    ),
)
