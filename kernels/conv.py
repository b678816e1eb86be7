"""Project and expand for convolutions that keep their factors: the input and the output gradients.

On a CPU, PyTorch's own convolutions compute both products without unfolding the input. The Triton kernels are those of
`project_factored` and `expand_factored`. They need the unfolded input, which is freed after the op or the step.

Dimensions: N samples, C channels, O outputs, H and W pixels, L Fisher blocks; G, P, I as in `factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import cpu_conv, cpu_update, reference
from .conv_geometry import ConvGeometry, conv_geometries
from .dispatch import define_op, dispatch, expect, zeros
from .expand_factored import EXPAND_CONFIGS, factors_products, launch_expand_update_
from .launches import slots_of
from .project_factored import PROJECT_CONFIGS, launch_project
from .repeated import ProductLaunches, Temporaries
from .spec import FLOATING, KernelSpec, nbytes, normal
from .unfold_conv import UNFOLD_CONFIGS, empty_patches, launch_unfold, unfoldings
from .update import example_numbers, example_param_dtype, expect_update, update_examples


@define_op(fake=lambda x, g, v, sizes, blocks, shape, *_: zeros(x[0], *shape))
def project_conv(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    sizes: list[int],
    blocks: list[int],
    shape: list[int],
    config: str = "default",
) -> Tensor:
    """Return y_LN with y_n = Σ_p g_npᵀ V a_np, summed over the convolutions of a block (equation 6; M4).

    If a convolution has many positions in relation to its channels, `conv_sample_grads` once and `project_rows` in
    every step are faster.

    Args:
        x: inputs [N, C, H, W] of each convolution, without their padding.
        g: output gradients [N, O, H, W].
        v: tensors V in the shape of the weights, [O, C / groups, kh, kw].
        sizes: the `ConvGeometry.numbers` of all convolutions, one after the other.
        blocks: the index of each convolution's Fisher block.
        shape: [L, N] of the result; a convolution with fewer samples adds to the first ones.
        config: the launch configuration of the kernel.

    Returns:
        y_LN, in the dtype of ``x``, but in float32 for half precision.

    Raises:
        ValueError: the shapes of a convolution's tensors do not belong together.
    """
    for x_NCHW, g_NOHW, v_OCHW, geometry in zip(x, g, v, conv_geometries(sizes), strict=True):
        _expect_convolution(x_NCHW, g_NOHW, v_OCHW, geometry)
    return dispatch(_project_conv, cpu_conv.project_conv, PROJECT_CONFIGS, config, x, g, v, sizes, blocks, shape)


def _expect_convolution(x_NCHW: Tensor, g_NOHW: Tensor, weight: Tensor, geometry: ConvGeometry) -> None:
    n, channels, *pixels = x_NCHW.shape
    expect("the weight", weight, g_NOHW.shape[1], channels // geometry.groups, *weight.shape[2:])
    expect("g_NOHW", g_NOHW, n, len(weight), *geometry.pixels(pixels, weight.shape[2:]))


def _project_conv(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    sizes: list[int],
    blocks: list[int],
    shape: list[int],
    config: str = "default",
) -> Tensor:
    taps_first = _taps_first(v)
    a = launch_unfold(x, _kernel_sizes(v), sizes, taps_first)
    return launch_project(a, _factors(g, sizes), _views(v, taps_first), blocks, shape, config)


def _taps_first(*weights: Sequence[Tensor]) -> list[bool]:
    """Return for each convolution whether patches run over the taps first: not if all tensors are contiguous."""
    return [not all(x.is_contiguous() for x in of_conv) for of_conv in zip(*weights, strict=True)]


def _kernel_sizes(weights: Sequence[Tensor]) -> list[int]:
    return [size for weight in weights for size in weight.shape[2:]]


def _views(weights: Sequence[Tensor], taps_first: Sequence[bool]) -> list[Tensor]:
    """Return weights as [O, T, I] with I over the channels, or as [O, 1, I] with I over the channels and the taps.

    In one of these orders the weight is a dense matrix: in the first if it is channels-last, else in the second. The
    patches of the input take the same order.
    """
    return [
        weight.view(*weight.shape[:2], -1).mT if first else weight.view(len(weight), 1, -1)
        for weight, first in zip(weights, taps_first, strict=True)
    ]


def _factors(g: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return g_NGPO of every convolution."""
    pairs = zip(g, conv_geometries(sizes), strict=True)
    return [g_NOHW.unflatten(1, (geometry.groups, -1)).flatten(3).mT for g_NOHW, geometry in pairs]


@define_op(mutates=("params", "momenta"))
def expand_conv_update_(
    params: list[Tensor],
    momenta: list[Tensor],
    grads: list[Tensor],
    x: list[Tensor],
    g: list[Tensor],
    sizes: list[int],
    w: list[Tensor],
    dampings: list[Tensor],
    settings: list[Tensor],
    nesterov: bool,
    config: str = "default",
) -> None:
    """Apply `update_` to convolutions' weights along (grad − Σ_n w_n J_n) / damping (equation 7; M4, M5).

    If a convolution has many positions in relation to its channels, `conv_sample_grads` once and `expand_rows_update_`
    in every step are faster.

    Args:
        params: weights [O, C / groups, kh, kw], changed in place.
        momenta: the momenta, of the same shapes; changed in place. Where each
            is the gradient itself, no momentum is kept, and what is in it afterwards is not defined.
        grads: the gradients, of the same shapes.
        x: inputs, as for `project_conv`.
        g: output gradients, as for `project_conv`.
        sizes: geometries, as for `project_conv`.
        w: the coefficients w_N of the rows of each J.
        dampings: a scalar for each weight.
        settings: [lr, momentum, weight_decay, shrink] of each weight, as for `update_`.
        nesterov: as for `update_`.
        config: the launch configuration of the kernel.

    Raises:
        ValueError: the shapes of a convolution's tensors do not belong together.
    """
    states = zip(params, momenta, grads, x, g, conv_geometries(sizes), w, dampings, settings, strict=True)
    for param, momentum, grad, x_NCHW, g_NOHW, geometry, w_N, *numbers in states:
        expect_update(param, momentum, grad, *numbers)
        _expect_convolution(x_NCHW, g_NOHW, param, geometry)
        expect("w_N", w_N, x_NCHW.shape[0])
    arguments = (params, momenta, grads, x, g, sizes, w, dampings, settings, nesterov)
    dispatch(_expand_conv_update_, cpu_update.expand_conv_update_, EXPAND_CONFIGS, config, *arguments)


def _expand_conv_update_(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], x: list[Tensor], g: list[Tensor],
    sizes: list[int], w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool,
    config: str = "default",
) -> None:  # fmt: skip
    taps_first = _taps_first(params, momenta, grads)
    params_OTI, momenta_OTI, grads_OTI = (_views(weights, taps_first) for weights in (params, momenta, grads))
    a = launch_unfold(x, _kernel_sizes(params), sizes, taps_first)
    factors, numbers = (a, _factors(g, sizes)), (w, dampings, settings)
    launch_expand_update_(params_OTI, momenta_OTI, grads_OTI, *factors, *numbers, nesterov, config)


def conv_products(
    params: list[Tensor], momenta: list[Tensor], grads: list[Tensor], x: list[Tensor], g: list[Tensor],
    sizes: list[int], w: list[Tensor], dampings: list[Tensor], settings: list[Tensor], nesterov: bool,
    blocks: list[int], configs: Sequence[str],
) -> ProductLaunches:  # fmt: skip
    """Return the launches of `project_conv` and `expand_conv_update_`; ``configs`` has one of each."""
    taps_first, kernel_sizes = _taps_first(params, momenta, grads), _kernel_sizes(params)
    a = empty_patches(x, kernel_sizes, sizes)
    unfolding = unfoldings(x, a, kernel_sizes, sizes, taps_first)
    slots = slots_of(unfolding.launches, 1, len(a))
    patches = Temporaries([a_NGPI.shape for a_NGPI in a], lambda _: unfolding.start(), 0, slots)
    params_OTI, momenta_OTI, grads_OTI = (_views(weights, taps_first) for weights in (params, momenta, grads))
    factors, numbers = (a, _factors(g, sizes)), (w, dampings, settings)
    made = factors_products(params_OTI, momenta_OTI, grads_OTI, *factors, *numbers, nesterov, blocks, configs)
    return made._replace(temporaries=(patches, *made.temporaries))


# (shape of the input, outputs, kernel size, geometry) of some layers.
_LAYERS: Sequence[tuple[tuple[int, int, int, int], int, tuple[int, int], ConvGeometry]] = (
    ((30, 8, 4, 5), 12, (3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)),
    ((30, 10, 5, 6), 6, (3, 2), ConvGeometry((2, 1), (0, 1), (1, 2), 2)),
    ((20, 5, 1, 11), 7, (1, 4), ConvGeometry((1, 3), (0, 2), (1, 1), 1)),
    ((30, 8, 3, 4), 12, (1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1)),  # its weight is an aligned matrix
)
_SIZES = [number for *_, geometry in _LAYERS for number in geometry.numbers]


def _example_layers(
    dtype: torch.dtype, device: torch.device, half: bool
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Return inputs, output gradients, and (parameters, momenta, gradients); the second weight is channels-last."""
    x = [normal(*shape, dtype=dtype, device=device) for shape, *_ in _LAYERS]
    g = [
        normal(shape[0], outputs, *geometry.pixels(shape[2:], kernel), dtype=dtype, device=device, seed=1)
        for shape, outputs, kernel, geometry in _LAYERS
    ]
    sizes = [(outputs, shape[1] // geometry.groups, *kernel) for shape, outputs, kernel, geometry in _LAYERS]
    param_dtype = example_param_dtype(dtype, half)
    states = [[normal(*size, dtype=param_dtype, device=device, seed=seed) for size in sizes] for seed in (3, 4, 5)]
    for weights in states:
        weights[1] = weights[1].to(memory_format=torch.channels_last)
    return x, g, states


def _project_example(dtype: torch.dtype, device: torch.device, half: bool) -> tuple[object, ...]:
    x, g, (_, _, grads) = _example_layers(dtype, device, half)
    return x, g, grads, _SIZES, [1, 1, 0, 0], [2, 30]


def _update_example(dtype: torch.dtype, device: torch.device, nesterov: bool, half: bool) -> tuple[object, ...]:
    x, g, states = _example_layers(dtype, device, half)
    numbers = zip(*(example_numbers(len(x_NCHW), device) for x_NCHW in x), strict=True)
    return *states, x, g, _SIZES, *map(list, numbers), nesterov


def _flops(g: Sequence[Tensor], weights: Sequence[Tensor]) -> int:
    return sum(2 * g_NOHW.numel() * weight[0].numel() for g_NOHW, weight in zip(g, weights, strict=True))


SPECS = (
    KernelSpec(
        name="project_conv",
        triton_impl=_project_conv,
        torch_impl=cpu_conv.project_conv,
        reference=reference.project_conv,
        examples={
            "four convolutions": partial(_project_example, half=False),
            "half-precision parameters": partial(_project_example, half=True),
        },
        flops=lambda x, g, v, *_: _flops(g, v),
        bytes=lambda x, g, v, sizes, blocks, shape: nbytes(*x, *g, *v) + 4 * shape[0] * shape[1],
        configs=(*PROJECT_CONFIGS, *UNFOLD_CONFIGS),
        dtypes=FLOATING,
        mutates=0,
    ),
    KernelSpec(
        name="expand_conv_update_",
        triton_impl=_expand_conv_update_,
        torch_impl=cpu_update.expand_conv_update_,
        reference=reference.expand_conv_update_,
        examples=update_examples(_update_example),
        flops=lambda params, momenta, grads, x, g, *_: _flops(g, params) + 9 * sum(p.numel() for p in params),
        bytes=lambda params, momenta, grads, x, g, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *x, *g),
        configs=(*EXPAND_CONFIGS, *UNFOLD_CONFIGS),
        dtypes=FLOATING,
        mutates=2,
    ),
)
