"""The definition of every op, kept simple so that it can be checked by reading: einsum, and loops over the weights.

The kernels (`KernelSpec.triton_impl`) and the tuned PyTorch code (`KernelSpec.torch_impl`) are tested against these
functions in float64. The package never runs them: on CUDA tensors the Triton kernels run, and on a CPU, in float64 or
with ``backend="torch"`` the code of `cpu.py`, `cpu_conv.py` and `cpu_update.py`. Every product with factors forms the
rows of J first. Numbers of equations are those of the paper; labels such as M1 are those of docs/math.md.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; C channels, H and W pixels, T taps of a
convolution's kernel; K entries of a flat gradient; L Fisher blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_geometry import conv_geometries, kernel_sizes_of

Tensors = list[Tensor]


def sample_grads(a_NGPI: Tensor, g_NGPO: Tensor) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ in every group, flat (equation 8, M1)."""
    return torch.einsum("ngpo,ngpi->ngoi", g_NGPO, a_NGPI).flatten(1)


def conv_sample_grads(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """J_n = Σ_p g_np a_npᵀ, where a_np is the patch of the input at position p (equation 8, M1)."""
    patches_NIP = F.unfold(x_NCHW, tuple(kernel_size), tuple(dilation), 0, tuple(stride))
    a_NGCTP = patches_NIP.unflatten(1, (groups, x_NCHW.shape[1] // groups, -1))
    g_NGOP = g_NOHW.flatten(2).unflatten(1, (groups, -1))
    return torch.einsum("ngop,ngctp->ngotc", g_NGOP, a_NGCTP).flatten(1)


def unfold_conv(x: Tensors, kernel_sizes: list[int], sizes: list[int], taps_first: list[bool]) -> Tensors:
    """The patches a_NGPI that `conv_sample_grads` multiplies; I runs over (C, T) or (T, C)."""
    a = []
    convolutions = zip(x, kernel_sizes_of(kernel_sizes), conv_geometries(sizes), taps_first, strict=True)
    for x_NCHW, kernel, (stride, padding, dilation, groups), first in convolutions:
        patches_NIP = F.unfold(x_NCHW, kernel, dilation, padding, stride)
        a_NGPCT = patches_NIP.unflatten(1, (groups, -1, kernel[0] * kernel[1])).permute(0, 1, 4, 2, 3)
        a.append((a_NGPCT.mT if first else a_NGPCT).flatten(3))
    return a


def gram_rows(j: Tensors, blocks: list[int], count: int) -> Tensor:
    """K = J Jᵀ, summed over the weights of a block (equation 5, M3)."""
    k_LNN = j[0].new_zeros(count, len(j[0]), len(j[0]))
    for block, j_NK in zip(blocks, j, strict=True):
        k_LNN[block] += torch.einsum("nk,mk->nm", j_NK, j_NK)
    return k_LNN


def gram(a: Tensors, g: Tensors, blocks: list[int], count: int) -> Tensor:
    """K = J Jᵀ with the J of `sample_grads`."""
    return gram_rows(_rows(a, g), blocks, count)


def project_rows(j: Tensors, v: Tensors, blocks: list[int], shape: list[int]) -> Tensor:
    """Return y = J V, summed over the weights of a block; a shorter J adds to the first rows (equation 6, M4)."""
    y_LN = j[0].new_zeros(shape)
    for block, j_NK, v_OTI in zip(blocks, j, v, strict=True):
        y_LN[block, : len(j_NK)] += torch.einsum("nk,k->n", j_NK, v_OTI.flatten())
    return y_LN


def project(a: Tensors, g: Tensors, v: Tensors, blocks: list[int], shape: list[int]) -> Tensor:
    """Return y = J V with the J of `sample_grads`."""
    return project_rows(_rows(a, g), v, blocks, shape)


def project_conv(x: Tensors, g: Tensors, v: Tensors, sizes: list[int], blocks: list[int], shape: list[int]) -> Tensor:
    """Return y = J V with the J of `conv_sample_grads`."""
    return project_rows(_conv_rows(x, g, v, sizes), [_taps_first(v_OCHW) for v_OCHW in v], blocks, shape)


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """Apply d = direction + λ θ;  m ← μ m + d;  θ ← (1 − η shrink) θ − η (d + μ m if nesterov, else m)  (M6)."""
    lr, momentum, weight_decay, shrink = settings
    d = direction + weight_decay * param
    m = momentum * momentum_buffer + d
    momentum_buffer.copy_(m)
    param.copy_((1 - lr * shrink) * param - lr * (d + momentum * m if nesterov else m))


def expand_rows_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, j: Tensors,
    w: Tensors, dampings: Tensors, settings: Tensors, nesterov: bool,
) -> None:  # fmt: skip
    """`update_` along (grad − Jᵀ w) / damping (equation 7, M4, M5)."""
    weights = zip(params, momenta, grads, j, w, dampings, settings, strict=True)
    for param, momentum, grad, j_NK, w_N, damping, numbers in weights:
        expanded = torch.einsum("nk,n->k", j_NK, w_N).view(param.shape)
        update_(param, momentum, (grad - expanded) / damping, numbers, nesterov)


def expand_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, a: Tensors, g: Tensors, *weights_and_numbers: Any
) -> None:
    """`expand_rows_update_` with the J of `sample_grads`."""
    expand_rows_update_(params, momenta, grads, _rows(a, g), *weights_and_numbers)


def expand_conv_update_(
    params: Tensors, momenta: Tensors, grads: Tensors, x: Tensors, g: Tensors, sizes: list[int], *numbers: Any
) -> None:
    """`expand_rows_update_` with the J of `conv_sample_grads`."""
    j = _conv_rows(x, g, params, sizes)
    params, momenta, grads = ([_taps_first(weight) for weight in weights] for weights in (params, momenta, grads))
    expand_rows_update_(params, momenta, grads, j, *numbers)


def _rows(a: Tensors, g: Tensors) -> Tensors:
    return [sample_grads(a_NGPI, g_NGPO) for a_NGPI, g_NGPO in zip(a, g, strict=True)]


def _conv_rows(x: Tensors, g: Tensors, weights: Tensors, sizes: list[int]) -> Tensors:
    j = []
    for x_NCHW, g_NOHW, weight, geometry in zip(x, g, weights, conv_geometries(sizes), strict=True):
        stride, _, dilation, groups = geometry
        padded_NCHW, kernel_size = geometry.padded(x_NCHW), list(weight.shape[2:])
        j.append(conv_sample_grads(padded_NCHW, g_NOHW, kernel_size, list(stride), list(dilation), groups))
    return j


def _taps_first(weight_OCHW: Tensor) -> Tensor:
    """Return the view [O, T, C] of a convolution's weight, in the order of J's columns."""
    return weight_OCHW.view(*weight_OCHW.shape[:2], -1).mT


def cholesky(k_LNN: Tensor, shift_L: Tensor) -> tuple[Tensor, Tensor]:
    """C Cᵀ = K + shift I, and the least squared diagonal entry of C, for positive definite matrices (M5).

    For others the implementations raise nothing: in place of that entry they return a number that is not positive.
    """
    eye_NN = torch.eye(k_LNN.shape[1], dtype=k_LNN.dtype, device=k_LNN.device)
    c_LNN = torch.linalg.cholesky(k_LNN + shift_L[:, None, None] * eye_NN)
    return c_LNN, torch.einsum("lnn->ln", c_LNN).square().amin(1)


def cholesky_inverse(c_LNN: Tensor) -> Tensor:
    """W = C⁻¹ (M5)."""
    return torch.linalg.inv(c_LNN)


def cholesky_solve(w_LNN: Tensor, y_LN: Tensor) -> Tensor:
    """Return w = Wᵀ (W y), where W is ``w_LNN`` (M5)."""
    return torch.einsum("lmn,lmk,lk->ln", w_LNN, w_LNN, y_LN)
