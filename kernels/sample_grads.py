"""Per-sample gradients J_n of layers whose weights are used at many positions: convolutions and sequences.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; C channels, H and W pixels; K entries
of a flat gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # entries of the unfolded input that the definition holds at a time


def sample_grads(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """Return j_NK with K = (G, O, I) flat: J_n = Σ_p g_np a_npᵀ in every group (paper, equation 8)."""
    return sample_grads_reference(a_NGPI, g_NGPO)


def sample_grads_reference(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ."""
    return (g_NGPO.mT @ a_NGPI).flatten(1)


def conv_sample_grads(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Return j_NK with K = (O, kh, kw, C / groups) flat, for a convolution of an input that is already padded.

    The input channel comes last, so that what one sample's gradient reads and writes is contiguous.
    """
    return conv_sample_grads_reference(x_NCHW, g_NOHW, kernel_size, stride, dilation, groups)


def conv_sample_grads_reference(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ over the unfolded input a, some samples at a time."""
    n, channels = x_NCHW.shape[:2]
    g_NGPO = g_NOHW.reshape(n, groups, -1, g_NOHW[0, 0].numel()).mT
    unfolded = g_NGPO.shape[2] * channels * kernel_size[0] * kernel_size[1]
    chunk = max(1, _CHUNK_ELEMENTS // unfolded)
    return torch.cat(
        [
            sample_grads_reference(unfold(x, kernel_size, stride, dilation, groups), g)
            for x, g in zip(x_NCHW.split(chunk), g_NGPO.split(chunk), strict=True)
        ]
    )


def unfold(x_NCHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """Return a_NGPI with I = (kh, kw, C / groups): what each position of a convolution sees of a padded input."""
    n, channels = x_NCHW.shape[:2]
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    x_NHWC = x_NCHW.permute(0, 2, 3, 1).contiguous()
    windows = x_NHWC.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    a = windows.unflatten(3, (groups, channels // groups)).permute(0, 3, 1, 2, 5, 6, 4)
    return a.reshape(n, groups, -1, kh * kw * channels // groups)
