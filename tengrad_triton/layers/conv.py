"""Convolutions and transposed convolutions.

In a transposed convolution the input and the output gradients exchange their roles.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, C channels; a * stands for the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.kernels.conv_geometry import ConvGeometry
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers.contribution import Canonical, ConvInput, OuterProducts, PerSampleGrads, canonical

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches_of(layer: Any, x: Tensor, padding: Sequence[int]) -> Tensor | ConvInput:
    """Return the inputs a_NGPI of a convolution's weight: the patches of ``x`` [N, C, *] after padding with zeros.

    In one or two dimensions the result is a `ConvInput`, from which ops read the patches directly.
    """
    kernel_size, stride, dilation = (tuple(size) for size in (layer.kernel_size, layer.stride, layer.dilation))
    if x.dim() == 5:
        padded = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
        return _unfolded(padded, kernel_size, stride, dilation, layer.groups)
    if x.dim() == 3:  # a signal is an image one pixel high
        x, padding = x.unsqueeze(2), (0, *padding)
        kernel_size, stride, dilation = (1, *kernel_size), (1, *stride), (1, *dilation)
    geometry = ConvGeometry(_pair(stride), _pair(padding), _pair(dilation), layer.groups)
    return ConvInput(x, list(kernel_size), geometry)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _unfolded(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Return a_NGPI with I = (kernel, C / groups) for any number of dimensions."""
    view = x.movedim(1, -1)
    for axis, (size, step, gap) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        view = view.unfold(1 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    dims = len(kernel_size)
    split = view.unflatten(1 + dims, (groups, -1))  # N, positions, G, C / groups, kernel
    a = split.movedim(1 + dims, 1).movedim(2 + dims, -1)
    return a.flatten(2 + dims).flatten(2, 1 + dims)


def _in_groups(g: Tensor, groups: int) -> Tensor:
    """Return ``g`` [N, G·O, *] as g_NGPO."""
    return g.reshape(len(g), groups, g.shape[1] // groups, -1).mT


def _numbers(padding: tuple[object, ...] | str) -> list[int]:
    assert not isinstance(padding, str)  # torch accepts no "same" or "valid" for a transposed convolution
    return [p for p in padding if isinstance(p, int)]


def _bias_grads(grad_y: Tensor) -> PerSampleGrads:
    return PerSampleGrads(widen(grad_y).flatten(2).sum(2))


@canonical.register
def _(layer: Convolution, x: Tensor, grad_y: Tensor) -> Canonical:
    # torch has resolved the padding to numbers, in the order of F.pad: last dimension first.
    around = list(layer._reversed_padding_repeated_twice)
    if layer.padding_mode == "zeros" and around[::2] == around[1::2]:
        a = patches_of(layer, x, around[::-2])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = patches_of(layer, F.pad(x, around, mode=mode), [0] * len(layer.kernel_size))
    return {"weight": OuterProducts(a, _in_groups(grad_y, layer.groups)), "bias": _bias_grads(grad_y)}


@canonical.register
def _(layer: Transposed, x: Tensor, grad_y: Tensor) -> Canonical:
    # The layer is the transpose of a convolution from y to x. So grad_y gives that convolution's patches, and x is in
    # the place of its output gradients.
    padding = [p for p in reversed(_numbers(layer.padding)) for _ in range(2)]
    padded = F.pad(grad_y, padding)
    axes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    covered = [(pixels - 1) * step + gap * (size - 1) + 1 for pixels, size, step, gap in axes]
    for axis, pixels in enumerate(covered):  # no patch has the pixels that output_padding adds
        padded = padded.narrow(2 + axis, 0, pixels)
    return {
        "weight": OuterProducts(patches_of(layer, padded, [0] * len(covered)), _in_groups(x, layer.groups)),
        "bias": _bias_grads(grad_y),
    }
