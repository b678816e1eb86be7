"""Per-sample gradients J_n of layers whose weights are used at many positions: convolutions and sequences.

One matrix product a sample, summed in float32 and stored in the dtype of the inputs. A convolution's windows are read
where they lie in a channels-last input; a sequence is a convolution with a 1×1 kernel and as many groups.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; C channels, H and W pixels; K entries
of a flat gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from .depthwise_sample_grads import DEPTHWISE_GRADS, depthwise_grads
from .project_factored import expect_factors, factors
from .conv_geometry import unpadded
from .spec import KernelSpec, contiguous, expect, nbytes, normal, rows_contiguous, runs_kernel
from .conv_sample_grads import WINDOW_CONFIGS, window_grads

_UNFOLD_BELOW = 1.75  # positions a channel below which unfolding a convolution's input pays (measured on two cores)
_UNFOLDED_BYTES, _GROUPED_BYTES = 2**21, 2**22  # unfolded inputs, or rows, that a thread's caches hold


@triton_op("tengrad_triton::sample_grads", mutates_args=())
def sample_grads(a_NGPI: Tensor, g_NGPO: Tensor, config: str = "default") -> Tensor:
    """Return j_NK with K = (G, O, I) flat: J_n = Σ_p g_np a_npᵀ in every group (paper, equation 8).

    With one position, or a few, keep the factors instead: they are smaller, and `gram` needs no J_n.
    """
    expect_factors(a_NGPI, g_NGPO)
    make = partial(_sample_grads, config=config) if runs_kernel(a_NGPI, g_NGPO) else sample_grads_torch
    return make(a_NGPI, g_NGPO)


def sample_grads_torch(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ."""
    return (g_NGPO.mT @ a_NGPI).flatten(1)


def _sample_grads(a_NGPI: Tensor, g_NGPO: Tensor, config: str = "default") -> Tensor:
    a_NGPI, g_NGPO = rows_contiguous(a_NGPI), rows_contiguous(g_NGPO.to(a_NGPI.dtype))
    positions, inputs = a_NGPI.shape[2:]
    sizes = (inputs, g_NGPO.shape[3], positions, positions, 1)
    strides = (0, a_NGPI.stride(2), 0, 0, *a_NGPI.stride()[:2], *g_NGPO.stride()[:3])
    return window_grads(a_NGPI, g_NGPO, 1, sizes, strides, config)


@triton_op("tengrad_triton::conv_sample_grads", mutates_args=())
def conv_sample_grads(
    x_NCHW: Tensor,
    g_NOHW: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    config: str = "default",
) -> Tensor:
    """Return j_NK with K = (O, kh, kw, C / groups) flat, for a convolution of an input that is already padded.

    The input channel comes last, so that what one sample's gradient reads and writes is contiguous. Tensors that are
    not channels-last are copied.
    """
    expect("g_NOHW", g_NOHW, x_NCHW.shape[0], *g_NOHW.shape[1:])
    axes = zip(x_NCHW.shape[2:], g_NOHW.shape[2:], kernel_size, stride, dilation, strict=True)
    for pixels, outputs, size, step, gap in axes:
        needed = (outputs - 1) * step + (size - 1) * gap + 1
        if pixels < needed:
            raise ValueError(f"{outputs} outputs need a padded input of {needed} pixels or more, got {pixels}")
    make = partial(_conv_sample_grads, config=config) if runs_kernel(x_NCHW, g_NOHW) else conv_sample_grads_torch
    return make(x_NCHW, g_NOHW, kernel_size, stride, dilation, groups)


def conv_sample_grads_torch(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ: the gradient of a convolution's weight with every sample as a group of its own.

    With few positions for its channels the unfolded input makes larger matrix products. On a CPU as many samples go
    together as its caches hold, and as many for each thread; what is in between then takes no memory either.
    """
    n, outputs, height, width = g_NOHW.shape
    sizes, inputs = (kernel_size, stride, dilation, groups), x_NCHW.shape[1] // groups * kernel_size[0] * kernel_size[1]
    if height * width < _UNFOLD_BELOW * x_NCHW.shape[1] // groups:
        fill, chunk = _fill_from_unfolded, _chunk(x_NCHW, groups * inputs * height * width, _UNFOLDED_BYTES)
    else:
        fill, chunk = _fill_from_grouped, _chunk(x_NCHW, outputs * inputs, _GROUPED_BYTES)
        if chunk >= n:
            return _grouped_grads(x_NCHW, g_NOHW, *sizes).reshape(n, -1)
    j_NGOI = x_NCHW.new_empty(n, groups, outputs // groups, inputs)
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        fill(j_NGOI[part], x_NCHW[part], g_NOHW[part], *sizes)
    return j_NGOI.flatten(1)


def _chunk(x_NCHW: Tensor, numbers: int, cached_bytes: int) -> int:
    """Return how many samples go together, where one takes so many numbers."""
    if not x_NCHW.is_cpu or torch.compiler.is_compiling():
        return len(x_NCHW)
    return max(1, cached_bytes // (numbers * x_NCHW.element_size())) * torch.get_num_threads()


def _fill_from_unfolded(j_NGOI: Tensor, x_NCHW: Tensor, g_NOHW: Tensor, *sizes: Any) -> None:
    kernel_size, *slides = sizes
    a_NGPI = unpadded(*slides).unfold(x_NCHW, kernel_size)
    torch.matmul(g_NOHW.reshape(*j_NGOI.shape[:3], -1), a_NGPI, out=j_NGOI)


def _fill_from_grouped(j_NGOI: Tensor, x_NCHW: Tensor, g_NOHW: Tensor, *sizes: Any) -> None:
    j = _grouped_grads(x_NCHW, g_NOHW, *sizes)
    j_NGOI.view(j.shape).copy_(j)


def _grouped_grads(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Return the gradients of all samples' outputs, [N O, kh, kw, C / groups]."""
    (n, channels), outputs = x_NCHW.shape[:2], g_NOHW.shape[1]
    x_1CHW, g_1OHW = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (x_NCHW, g_NOHW))
    size = (n * outputs, channels // groups, *kernel_size)
    return unpadded(stride, dilation, n * groups).weight_grad(x_1CHW, g_1OHW, size).permute(0, 2, 3, 1)


def _conv_sample_grads(
    x_NCHW: Tensor,
    g_NOHW: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    config: str = "default",
) -> Tensor:
    x_NHWC = contiguous(x_NCHW.permute(0, 2, 3, 1))
    g_NHWO = contiguous(g_NOHW.to(x_NCHW.dtype).permute(0, 2, 3, 1))
    per_sample, per_row, per_pixel = x_NHWC.stride()[:3]
    _, height, width, outputs = g_NHWO.shape
    steps = (stride[0] * per_row, stride[1] * per_pixel, dilation[0] * per_row, dilation[1] * per_pixel)
    if groups == per_pixel:
        return depthwise_grads(x_NHWC, g_NHWO, kernel_size, steps, config)
    rows, columns, inputs = *kernel_size, per_pixel // groups
    if groups == 1 and dilation[1] == 1:
        # The pixels of a window's row lie side by side: together they fill a tile that few channels would not.
        columns, inputs = 1, columns * inputs
    sizes = (inputs, outputs // groups, height * width, width, columns)
    strides = (*steps, per_sample, per_pixel // groups, g_NHWO.stride(0), outputs // groups, outputs)
    return window_grads(x_NHWC, g_NHWO, rows * columns, sizes, strides, config)


def _conv_example(
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, ...]:
    """Arguments for an input of this shape [N, C, H, W], of which the last row and column may go unused."""
    pixels = unpadded(stride, dilation, groups).pixels(shape[2:], kernel_size)
    x_NCHW = normal(*shape, dtype=dtype, device=device)
    g_NOHW = normal(shape[0], outputs, *pixels, dtype=dtype, device=device, seed=1)
    return x_NCHW, g_NOHW, kernel_size, stride, dilation, groups


def _conv_flops(x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], *rest: Any) -> int:
    return 2 * g_NOHW.numel() * x_NCHW.shape[1] // rest[-1] * kernel_size[0] * kernel_size[1]


def _conv_bytes(x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], *rest: Any) -> int:
    written = x_NCHW.shape[0] * g_NOHW.shape[1] * x_NCHW.shape[1] // rest[-1] * kernel_size[0] * kernel_size[1]
    return nbytes(x_NCHW, g_NOHW) + written * x_NCHW.element_size()


SPECS = (
    KernelSpec(
        name="sample_grads",
        triton_impl=_sample_grads,
        torch_impl=sample_grads_torch,
        examples={
            "groups": lambda dtype, device: factors(dtype, device, (3, 2, 37, 20, 9)),
            "large tiles": lambda dtype, device: factors(dtype, device, (2, 1, 70, 150, 130)),
        },
        flops=lambda a_NGPI, g_NGPO: 2 * a_NGPI.numel() * g_NGPO.shape[3],
        bytes=lambda a_NGPI, g_NGPO: nbytes(a_NGPI, g_NGPO) + nbytes(a_NGPI) // a_NGPI.shape[2] * g_NGPO.shape[3],
        configs=WINDOW_CONFIGS,
    ),
    KernelSpec(
        name="conv_sample_grads",
        triton_impl=_conv_sample_grads,
        torch_impl=conv_sample_grads_torch,
        examples={
            "merged rows": partial(_conv_example, (3, 5, 11, 13), 7, [3, 2], [2, 1], [1, 1], 1),
            "dilated": partial(_conv_example, (2, 20, 11, 12), 9, [2, 3], [1, 2], [2, 3], 1),
            "groups": partial(_conv_example, (2, 10, 9, 8), 6, [3, 3], [1, 1], [1, 1], 2),
            "large tiles": partial(_conv_example, (2, 70, 5, 6), 70, [3, 3], [1, 1], [1, 1], 1),
            "depthwise": partial(_conv_example, (2, 35, 9, 8), 35, [3, 3], [2, 1], [1, 1], 35),
            "channel multiplier": partial(_conv_example, (2, 5, 9, 12), 10, [5, 5], [1, 1], [1, 2], 5),
        },
        flops=_conv_flops,
        bytes=_conv_bytes,
        configs=(*WINDOW_CONFIGS, *DEPTHWISE_GRADS.values()),
    ),
)
