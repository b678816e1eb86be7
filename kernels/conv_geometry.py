"""How a convolution's windows slide over its input, and what PyTorch has for them: unfolding, and both products.

Dimensions: N samples, G groups, P positions, I inputs of a group; C channels, O outputs, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import contiguous


class ConvGeometry(NamedTuple):
    """A convolution's stride, its padding by zeros and its dilation, each by row and by column, and its groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def numbers(self) -> list[int]:
        """Return all of it, flat."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    def pixels(self, size: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
        """Return the pixels of the output, by row and by column, for an input of this size."""
        axes = zip(size, kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(pixels + 2 * pad - gap * (taps - 1) - 1) // step + 1 for pixels, taps, step, pad, gap in axes]

    def padded(self, x_NCHW: Tensor) -> Tensor:
        """Return the input with its padding; itself where there is none."""
        rows, columns = self.padding
        return F.pad(x_NCHW, (columns, columns, rows, rows)) if rows or columns else x_NCHW

    def unfold(self, x_NCHW: Tensor, kernel_size: Sequence[int]) -> Tensor:
        """Return a_NGPI with I = (kh, kw, C / groups): what each position sees of an input."""
        n, inputs = len(x_NCHW), x_NCHW.shape[1] // self.groups
        x_NHWC = contiguous(self.padded(x_NCHW).permute(0, 2, 3, 1))
        per_sample, *axes, _ = x_NHWC.stride()
        steps = [step * axis for step, axis in zip(self.stride, axes, strict=True)]
        taps = [gap * axis for gap, axis in zip(self.dilation, axes, strict=True)]
        pixels = self.pixels(x_NCHW.shape[2:], kernel_size)
        windows = x_NHWC.as_strided(
            (n, self.groups, *pixels, *kernel_size, inputs), (per_sample, inputs, *steps, *taps, 1)
        )
        return windows.reshape(n, self.groups, pixels[0] * pixels[1], -1)

    def convolved(self, x_NCHW: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution."""
        return F.conv2d(x_NCHW, weight, None, *self)

    def weight_grad(self, x_NCHW: Tensor, g_NOHW: Tensor, size: Sequence[int]) -> Tensor:
        """Return the gradient of the weight; unlike `torch.nn.grad.conv2d_weight`, without a copy of a weight."""
        weight, options = x_NCHW.new_empty(size), (False, [0, 0], self.groups, (False, True, False))
        return torch.ops.aten.convolution_backward(
            g_NOHW, x_NCHW, weight, None, self.stride, self.padding, self.dilation, *options
        )[1]


def unpadded(stride: Sequence[int], dilation: Sequence[int], groups: int) -> ConvGeometry:
    """Return how windows slide over an input that has its padding already."""
    (sh, sw), (dh, dw) = stride, dilation
    return ConvGeometry((sh, sw), (0, 0), (dh, dw), groups)


def conv_geometries(numbers: Sequence[int]) -> Iterator[ConvGeometry]:
    """Yield what a flat list of all layers' `ConvGeometry.numbers` holds."""
    for at in range(0, len(numbers), 7):
        a, b, c, d, e, f, groups = numbers[at : at + 7]
        yield ConvGeometry((a, b), (c, d), (e, f), groups)
