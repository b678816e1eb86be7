"""Project and expand for convolutions that keep their factors: an image seen through windows, and derivatives.

PyTorch's own convolutions are the definition, which never unfold the image. The kernels of `reuse` and `reuse_update`
take unfolded windows, which exist for the time of the launch.

Dimensions: N samples, C channels, O outputs, H and W pixels; G, P, I as in `reuse`; L rows of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from .project_factored import SPECS as PROJECT
from .project_factored import _project
from .expand_factored import SPECS as EXPAND
from .expand_factored import _expand_update_
from .conv_geometry import ConvGeometry, conv_geometries
from .spec import KernelSpec, expect, nbytes, normal, runs_kernel, widen
from .update import example_numbers, expect_update, negated_ratios, update_along_


@custom_op("tengrad_triton::project_conv", mutates_args=())
def project_conv(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    sizes: list[int],
    rows: list[int],
    shape: list[int],
    config: str = "default",
) -> Tensor:
    """Return y_LN with y[rows[t], n] = Σ_p g_npᵀ V a_np over the convolutions of a row (paper, equation 6).

    ``x`` are inputs [N, C, H, W], ``g`` derivatives by outputs [N, O, H, W], ``v`` shaped like weights; ``sizes`` has
    all `ConvGeometry.numbers`, and ``shape`` is [L, N].
    """
    for x_NCHW, g_NOHW, v_OCHW, view in zip(x, g, v, conv_geometries(sizes), strict=True):
        _expect_convolution(x_NCHW, g_NOHW, v_OCHW, view)
    make = partial(_project_conv, config=config) if runs_kernel(*x, *g, *v) else project_conv_torch
    return make(x, g, v, sizes, rows, shape)


@project_conv.register_fake
def _(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    sizes: list[int],
    rows: list[int],
    shape: list[int],
    config: str = "default",
) -> Tensor:
    return x[0].new_empty(shape, dtype=torch.promote_types(x[0].dtype, torch.float32))


def _expect_convolution(x_NCHW: Tensor, g_NOHW: Tensor, weight: Tensor, view: ConvGeometry) -> None:
    n, channels, *pixels = x_NCHW.shape
    expect("the weight", weight, g_NOHW.shape[1], channels // view.groups, *weight.shape[2:])
    expect("g_NOHW", g_NOHW, n, len(weight), *view.pixels(pixels, weight.shape[2:]))


def project_conv_torch(
    x: list[Tensor], g: list[Tensor], v: list[Tensor], sizes: list[int], rows: list[int], shape: list[int]
) -> Tensor:
    """y_n = ⟨g_n, x_n * V⟩, added up over the convolutions of a row."""
    y_LN = x[0].new_zeros(shape, dtype=torch.promote_types(x[0].dtype, torch.float32))
    for row, x_NCHW, g_NOHW, v_OCHW, view in zip(rows, x, g, v, conv_geometries(sizes), strict=True):
        seen_NOHW = view.convolved(widen(x_NCHW), v_OCHW.to(y_LN.dtype))
        y_LN[row, : len(x_NCHW)].add_((seen_NOHW * g_NOHW).sum((1, 2, 3)))
    return y_LN


def _project_conv(
    x: list[Tensor],
    g: list[Tensor],
    v: list[Tensor],
    sizes: list[int],
    rows: list[int],
    shape: list[int],
    config: str = "default",
) -> Tensor:
    return _project(*_factors(x, g, v, sizes), [v_OCHW.flatten(2).mT for v_OCHW in v], rows, shape, config)


def _factors(
    x: Sequence[Tensor], g: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a_NGPI and g_NGPO of every convolution."""
    views = list(conv_geometries(sizes))
    a = [view.unfold(x_NCHW, weight.shape[2:]) for x_NCHW, weight, view in zip(x, weights, views, strict=True)]
    return a, [x.unflatten(1, (view.groups, -1)).flatten(3).mT for x, view in zip(g, views, strict=True)]


@custom_op("tengrad_triton::expand_conv_update_", mutates_args=("params", "momenta"))
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
    """Step convolutions' weights along (grad − Σ_n w_n J_n) / damping in place (paper, equation 7).

    `update_` is the rule; the rest is as in `project_conv`.
    """
    states = zip(params, momenta, grads, x, g, conv_geometries(sizes), w, dampings, settings, strict=True)
    for param, momentum, grad, x_NCHW, g_NOHW, view, w_N, *numbers in states:
        expect_update(param, momentum, grad, *numbers)
        _expect_convolution(x_NCHW, g_NOHW, param, view)
        expect("w_N", w_N, x_NCHW.shape[0])
    kernel = runs_kernel(*params, *momenta, *grads, *x, *g, *w)
    update = partial(_expand_conv_update_, config=config) if kernel else expand_conv_update_torch_
    update(params, momenta, grads, x, g, sizes, w, dampings, settings, nesterov)


def expand_conv_update_torch_(
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
) -> None:
    """`update_` along (grad − U) / damping, where U is the gradient of the weight for derivatives w_n g_n."""
    layers = zip(params, x, g, conv_geometries(sizes), negated_ratios(w, dampings), strict=True)
    expanded = (
        (t, view.weight_grad(widen(x_NCHW), widen(g_NOHW) * u_N[:, None, None, None], weight.shape))
        for t, (weight, x_NCHW, g_NOHW, view, u_N) in enumerate(layers)
    )
    update_along_(params, momenta, grads, expanded, dampings, settings, nesterov)


def _expand_conv_update_(
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
    params_OKI, momenta_OKI, grads_OKI = (
        [tensor.view(*tensor.shape[:2], -1).mT for tensor in kind] for kind in (params, momenta, grads)
    )
    a, g = _factors(x, g, params, sizes)
    _expand_update_(params_OKI, momenta_OKI, grads_OKI, a, g, w, dampings, settings, nesterov, config)


# (input, outputs, kernel, how it slides) of some layers.
_EXAMPLES: Sequence[tuple[tuple[int, int, int, int], int, tuple[int, int], ConvGeometry]] = (
    ((30, 8, 9, 8), 12, (3, 3), ConvGeometry(padding=(1, 1))),
    ((30, 10, 7, 9), 6, (3, 2), ConvGeometry((2, 1), (0, 1), (1, 2), 2)),
    ((20, 5, 1, 11), 7, (1, 4), ConvGeometry((1, 3), (0, 2))),
    ((30, 8, 5, 4), 12, (1, 1), ConvGeometry()),  # whose weight is a matrix with aligned rows
)


def _example_layers(dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
    """Return input, derivatives, and (parameter, momentum, gradient) of every example."""
    layers = []
    for shape, outputs, kernel, view in _EXAMPLES:
        x_NCHW = normal(*shape, dtype=dtype, device=device)
        state = [
            normal(outputs, shape[1] // view.groups, *kernel, dtype=torch.float32, device=device, seed=seed)
            for seed in (3, 4, 5)
        ]
        pixels = view.pixels(shape[2:], kernel)
        layers.append((x_NCHW, normal(shape[0], outputs, *pixels, dtype=dtype, device=device, seed=1), state))
    return layers


_SIZES = [number for *_, view in _EXAMPLES for number in view.numbers]


def _project_example(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    x, g, states = map(list, zip(*_example_layers(dtype, device), strict=True))
    return x, g, [state[2] for state in states], _SIZES, [1, 1, 0, 0], [2, 30]


def _update_example(dtype: torch.dtype, device: torch.device, nesterov: bool) -> tuple[object, ...]:
    x, g, states = map(list, zip(*_example_layers(dtype, device), strict=True))
    numbers = zip(*(example_numbers(len(x_NCHW), device) for x_NCHW in x), strict=True)
    return *map(list, zip(*states, strict=True)), x, g, _SIZES, *map(list, numbers), nesterov


def _flops(g: Sequence[Tensor], weights: Sequence[Tensor]) -> int:
    return sum(2 * g_NOHW.numel() * weight[0].numel() for g_NOHW, weight in zip(g, weights, strict=True))


SPECS = (
    KernelSpec(
        name="project_conv",
        triton_impl=_project_conv,
        torch_impl=project_conv_torch,
        examples={"four convolutions": _project_example},
        flops=lambda x, g, v, *_: _flops(g, v),
        bytes=lambda x, g, v, sizes, rows, shape: nbytes(*x, *g, *v) + 4 * shape[0] * shape[1],
        configs=PROJECT[0].configs,
    ),
    KernelSpec(
        name="expand_conv_update_",
        triton_impl=_expand_conv_update_,
        torch_impl=expand_conv_update_torch_,
        examples={name: partial(_update_example, nesterov=name == "nesterov") for name in ("heavy ball", "nesterov")},
        flops=lambda params, momenta, grads, x, g, *_: _flops(g, params) + 9 * sum(p.numel() for p in params),
        bytes=lambda params, momenta, grads, x, g, *_: 2 * nbytes(*params, *momenta) + nbytes(*grads, *x, *g),
        configs=EXPAND[0].configs,
        mutates=2,
    ),
)
