"""Convolutions, and transposed ones, which are convolutions with input and output exchanged.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, C channels; a * stands for the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.kernels.conv_geometry import ConvGeometry
from tengrad_triton.layers.form import Canonical, Explicit, Outer, Windows, canonical

# torch's names for them, of one to three dimensions
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def windows(layer: Any, x: Tensor, padding: Sequence[int]) -> Tensor | Windows:
    """Return what each position of a convolution sees of its input [N, C, *], with zeros around it: a_NGPI, unformed in
    a plane.
    """
    kernel_size, stride, dilation = (tuple(size) for size in (layer.kernel_size, layer.stride, layer.dilation))
    if x.dim() == 5:
        padded = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
        return _unfolded(padded, kernel_size, stride, dilation, layer.groups)
    if x.dim() == 3:  # a line is a plane one pixel high
        x, padding = x.unsqueeze(2), (0, *padding)
        kernel_size, stride, dilation = (1, *kernel_size), (1, *stride), (1, *dilation)
    return Windows(x, list(kernel_size), ConvGeometry(stride, tuple(padding), dilation, layer.groups))


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


def _grouped(g: Tensor, groups: int) -> Tensor:
    """Return g_NGPO of derivatives [N, O, *]."""
    return g.reshape(len(g), groups, g.shape[1] // groups, -1).mT


def _numbers(padding: tuple[object, ...] | str) -> list[int]:
    assert not isinstance(padding, str)  # torch takes no words for a transposed convolution
    return [p for p in padding if isinstance(p, int)]


def _bias(grad_y: Tensor) -> Explicit:
    return Explicit(grad_y.flatten(2).sum(2))


@canonical.register
def _(layer: Convolution, x: Tensor, grad_y: Tensor) -> Canonical:
    # torch keeps the padding of every spelling here (numbers, 'same', 'valid'), last dimension first, as F.pad wants it
    around = list(layer._reversed_padding_repeated_twice)
    if layer.padding_mode == "zeros" and around[::2] == around[1::2]:
        seen = windows(layer, x, around[::-2])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        seen = windows(layer, F.pad(x, around, mode=mode), [0] * len(layer.kernel_size))
    return {"weight": Outer(seen, _grouped(grad_y, layer.groups)), "bias": _bias(grad_y)}


@canonical.register
def _(layer: Transposed, x: Tensor, grad_y: Tensor) -> Canonical:
    # x is what a convolution of y with this weight would return: it gives the outputs, and y's derivative the windows.
    padding = [p for p in reversed(_numbers(layer.padding)) for _ in range(2)]
    padded = F.pad(grad_y, padding)
    axes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    seen = [(pixels - 1) * step + gap * (size - 1) + 1 for pixels, size, step, gap in axes]
    for axis, pixels in enumerate(seen):  # what output_padding adds, no window sees
        padded = padded.narrow(2 + axis, 0, pixels)
    return {"weight": Outer(windows(layer, padded, [0] * len(seen)), _grouped(x, layer.groups)), "bias": _bias(grad_y)}
