"""The tuned PyTorch code of the ops that compute rows of J, and of `project_conv` (see `cpu`).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; C channels, H and W pixels; K entries
of a flat gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conv_geometry import conv_geometries, kernel_sizes_of, unpadded
from .dispatch import widen, zeros

_UNFOLD_BELOW = 1.75  # with fewer positions for each channel, unfolding the input is faster (measured on two cores)
_UNFOLDED_BYTES = 2**21  # the caches of a thread hold this much of an unfolded input,
_GROUPED_BYTES = 2**22  # or this much of J


def sample_grads(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """Take one batched product."""
    return (widen(g_NGPO).mT @ widen(a_NGPI)).flatten(1)


def conv_sample_grads(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Compute the rows in one of two ways.

    With few positions in relation to the channels, multiply the output gradients by the unfolded input. Otherwise
    compute the weight gradient of one convolution in which every sample is a group. On a CPU, process as many samples
    at a time as the caches of all threads hold, so that the intermediate tensors stay small.
    """
    x_NCHW, g_NOHW = widen(x_NCHW), widen(g_NOHW)
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


def _chunk(x_NCHW: Tensor, entries: int, cached_bytes: int) -> int:
    """Return how many samples to process at a time if each needs ``entries`` entries."""
    if not x_NCHW.is_cpu or torch.compiler.is_compiling():
        return len(x_NCHW)
    return max(1, cached_bytes // (entries * x_NCHW.element_size())) * torch.get_num_threads()


def _fill_from_unfolded(j_NGOI: Tensor, x_NCHW: Tensor, g_NOHW: Tensor, *sizes: Any) -> None:
    kernel_size, *geometry = sizes
    a_NGPI = unpadded(*geometry).unfold(x_NCHW, kernel_size)
    torch.matmul(g_NOHW.reshape(*j_NGOI.shape[:3], -1), a_NGPI, out=j_NGOI)


def _fill_from_grouped(j_NGOI: Tensor, x_NCHW: Tensor, g_NOHW: Tensor, *sizes: Any) -> None:
    j = _grouped_grads(x_NCHW, g_NOHW, *sizes)
    j_NGOI.view(j.shape).copy_(j)


def _grouped_grads(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Return the weight gradients [N O, kh, kw, C / groups] of one image that has the channels of all samples."""
    (n, channels), outputs = x_NCHW.shape[:2], g_NOHW.shape[1]
    x_1CHW, g_1OHW = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (x_NCHW, g_NOHW))
    size = (n * outputs, channels // groups, *kernel_size)
    return unpadded(stride, dilation, n * groups).weight_grad(x_1CHW, g_1OHW, size).permute(0, 2, 3, 1)


def unfold_conv(x: list[Tensor], kernel_sizes: list[int], sizes: list[int], taps_first: list[bool]) -> list[Tensor]:
    """Copy a strided view of each padded input."""
    convolutions = zip(x, kernel_sizes_of(kernel_sizes), conv_geometries(sizes), taps_first, strict=True)
    # Patches of one pixel may be a view of the input, and an op must not return its arguments.
    return [g.unfold(widen(x_NCHW), kernel, first).clone() for x_NCHW, kernel, g, first in convolutions]


def project_conv(
    x: list[Tensor], g: list[Tensor], v: list[Tensor], sizes: list[int], blocks: list[int], shape: list[int]
) -> Tensor:
    """Compute ⟨g_n, x_n * V⟩ with torch's convolution *, which does not unfold the input."""
    y_LN = zeros(x[0], *shape)
    for block, x_NCHW, g_NOHW, v_OCHW, geometry in zip(blocks, x, g, v, conv_geometries(sizes), strict=True):
        output_NOHW = geometry.convolve(widen(x_NCHW), v_OCHW.to(y_LN.dtype))
        y_LN[block, : len(x_NCHW)].add_((output_NOHW * g_NOHW).sum((1, 2, 3)))
    return y_LN
