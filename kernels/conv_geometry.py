"""The geometry of a convolution; PyTorch's unfolding, convolution and weight gradient for such a geometry.

Dimensions: N samples, G groups, P positions, I inputs of a group; C channels, O outputs, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import contiguous


class ConvGeometry(NamedTuple):
    """A convolution's stride, padding by zeros and dilation, each as (vertical, horizontal), and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def numbers(self) -> list[int]:
        """Return the seven numbers in order, as ops take them."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    def pixels(self, size: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
        """Return the output's height and width for an input of this height and width."""
        axes = zip(size, kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [(pixels + 2 * pad - gap * (taps - 1) - 1) // step + 1 for pixels, taps, step, pad, gap in axes]

    def padded(self, x_NCHW: Tensor) -> Tensor:
        """Return the input with its padding; the input itself where there is none."""
        vertical, horizontal = self.padding
        return F.pad(x_NCHW, (horizontal, horizontal, vertical, vertical)) if vertical or horizontal else x_NCHW

    def unfold(self, x_NCHW: Tensor, kernel_size: Sequence[int], taps_first: bool = True) -> Tensor:
        """Return a_NGPI: the patch of the input that each output position multiplies.

        I runs over (kh, kw, C / groups), or over (C / groups, kh, kw) without ``taps_first``.
        """
        n, inputs = len(x_NCHW), x_NCHW.shape[1] // self.groups
        pixels, padded_NCHW = self.pixels(x_NCHW.shape[2:], kernel_size), self.padded(x_NCHW)
        if taps_first:  # neighbours in the result are then neighbours in the input, too
            padded_NCHW = contiguous(padded_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        per_sample, per_channel, *axes = padded_NCHW.stride()
        steps = [step * axis for step, axis in zip(self.stride, axes, strict=True)]
        taps = [gap * axis for gap, axis in zip(self.dilation, axes, strict=True)]
        patches = padded_NCHW.as_strided(
            (n, self.groups, *pixels, *kernel_size, inputs),
            (per_sample, inputs * per_channel, *steps, *taps, per_channel),
        )
        return (patches if taps_first else patches.movedim(-1, 4)).reshape(n, self.groups, pixels[0] * pixels[1], -1)

    def convolve(self, x_NCHW: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of the input with a weight [O, C / groups, kh, kw]."""
        return F.conv2d(x_NCHW, weight, None, *self)

    def weight_grad(self, x_NCHW: Tensor, g_NOHW: Tensor, size: Sequence[int]) -> Tensor:
        """Return the gradient with respect to a weight of size [O, C / groups, kh, kw], from output gradients g."""
        weight, options = x_NCHW.new_empty(size), (False, [0, 0], self.groups, (False, True, False))
        return torch.ops.aten.convolution_backward(
            g_NOHW, x_NCHW, weight, None, self.stride, self.padding, self.dilation, *options
        )[1]


def unpadded(stride: Sequence[int], dilation: Sequence[int], groups: int) -> ConvGeometry:
    """Return the geometry of a convolution whose input is already padded."""
    (sh, sw), (dh, dw) = stride, dilation
    return ConvGeometry((sh, sw), (0, 0), (dh, dw), groups)


def kernel_sizes_of(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the kernel sizes of a list that holds their heights and widths one after the other."""
    return zip(numbers[::2], numbers[1::2], strict=True)


def conv_geometries(numbers: Sequence[int]) -> Iterator[ConvGeometry]:
    """Yield the geometries of a list that holds their `ConvGeometry.numbers` one after the other."""
    for at in range(0, len(numbers), 7):
        a, b, c, d, e, f, groups = numbers[at : at + 7]
        yield ConvGeometry((a, b), (c, d), (e, f), groups)
