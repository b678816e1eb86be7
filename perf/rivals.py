"""What torch has to offer for each kernel's job: the definition, and other expressions where one may be faster.

A rival returns what the kernel does, up to rounding. Of all of them, eager and compiled, the best one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tengrad_triton.kernels.sample_grads import unfold
from tengrad_triton.kernels.spec import KernelSpec
from torch import Tensor

Work = Callable[..., Any]


def _gram_of_pairs(a: list[Tensor], g: list[Tensor]) -> Tensor:
    """One product of all positions with all, for each factor."""
    ks = []
    for a_NGPI, g_NGPO in zip(a, g, strict=True):
        a_GRI, g_GRO = a_NGPI.transpose(0, 1).flatten(1, 2), g_NGPO.transpose(0, 1).flatten(1, 2)
        pairs_GRR = (a_GRI @ a_GRI.mT) * (g_GRO @ g_GRO.mT)
        n, p = a_NGPI.shape[0], a_NGPI.shape[2]
        ks.append(pairs_GRR.view(-1, n, p, n, p).sum((0, 2, 4)))
    return torch.stack(ks)


def _grouped_convolution(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Samples as groups of one convolution, whose weight's gradient is what is wanted (cuDNN on a GPU)."""
    n, channels = x_NCHW.shape[:2]
    x, g = x_NCHW.reshape(1, -1, *x_NCHW.shape[2:]), g_NOHW.reshape(1, -1, *g_NOHW.shape[2:])
    shape = (n * g_NOHW.shape[1], channels // groups, *kernel_size)
    arguments = (stride, [0, 0], dilation, False, [0, 0], n * groups, (False, True, False))
    _, j, _ = torch.ops.aten.convolution_backward(g, x, x.new_empty(shape), None, *arguments)
    return j.view(n, -1, channels // groups, kernel_size[0] * kernel_size[1]).mT.flatten(1)


def _batched_product(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """One batched matrix product on the unfolded input of all samples at once."""
    a_NGPI = unfold(x_NCHW, kernel_size, stride, dilation, groups)
    g_NGOP = g_NOHW.reshape(len(x_NCHW), groups, -1, g_NOHW[0, 0].numel())
    return (g_NGOP @ a_NGPI).flatten(1)


def _project_by_expansion(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    return ((a_NGPI @ v_GOI.mT) * g_NGPO).sum((1, 2, 3))


def _expand_by_product(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    g_GRO = (g_NGPO * w_N[:, None, None, None]).transpose(0, 1).flatten(1, 2)
    return g_GRO.mT @ a_NGPI.transpose(0, 1).flatten(1, 2)


OTHERS: Mapping[str, Mapping[str, Work]] = {
    "gram": {"pairs": _gram_of_pairs},
    "conv_sample_grads": {"grouped convolution": _grouped_convolution, "batched product": _batched_product},
    "project": {"product": _project_by_expansion},
    "expand": {"product": _expand_by_product},
}


def rivals(spec: KernelSpec, compiled: bool) -> dict[str, Work]:
    """Return torch's expressions for a kernel, by name; with ``compiled`` each of them compiled as well."""
    eager: dict[str, Work] = {"definition": spec.reference, **OTHERS.get(spec.name, {})}
    if not compiled:
        return eager
    return eager | {f"{name}, compiled": torch.compile(work, dynamic=False) for name, work in eager.items()}
