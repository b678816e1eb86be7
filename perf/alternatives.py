"""torch's expressions for what each kernel computes: the tuned CPU code, and others where one may be faster.

An alternative returns the same as the kernel, up to rounding. The fastest of all, eager or compiled, counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.limits import allowing_tf32
from tengrad_triton.kernels.conv_geometry import unpadded
from tengrad_triton.kernels.spec import KernelSpec

Work = Callable[..., Any]


def _gram_by_einsum(a: list[Tensor], g: list[Tensor], blocks: list[int], count: int) -> Tensor:
    """One einsum for each factor of the equation."""
    n = len(a[0])
    k_LNN = a[0].new_zeros(count, n, n)
    for block, a_NGPI, g_NGPO in zip(blocks, a, g, strict=True):
        aa, gg = (torch.einsum("ngpx,mgqx->gnpmq", x, x) for x in (a_NGPI, g_NGPO))
        k_LNN[block] += (aa * gg).sum((0, 2, 4))
    return k_LNN


def _gram_of_stacked(j: list[Tensor], blocks: list[int], count: int) -> Tensor:
    """One batched product, with all weights padded to the widest."""
    widest = max(x.shape[1] for x in j)
    j_TNK = torch.stack([F.pad(x, (0, widest - x.shape[1])) for x in j])
    k_TNN = j_TNK @ j_TNK.mT
    if blocks == list(range(count)):
        return k_TNN
    # Not by index_add_: its indices would be copied to the device, and a CUDA graph cannot capture that.
    k_LNN = torch.zeros_like(k_TNN[:1]).repeat(count, 1, 1)
    for block, k_NN in zip(blocks, k_TNN, strict=True):
        k_LNN[block] += k_NN
    return k_LNN


def _grouped_convolution(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """One convolution with samples as groups: its weight gradient has the per-sample gradients (cuDNN on a GPU)."""
    n, channels = x_NCHW.shape[:2]
    x, g = x_NCHW.reshape(1, -1, *x_NCHW.shape[2:]), g_NOHW.reshape(1, -1, *g_NOHW.shape[2:])
    shape = (n * g_NOHW.shape[1], channels // groups, *kernel_size)
    arguments = (stride, [0, 0], dilation, False, [0, 0], n * groups, (False, True, False))
    _, j, _ = torch.ops.aten.convolution_backward(g, x, x.new_empty(shape), None, *arguments)
    return j.view(n, -1, channels // groups, kernel_size[0] * kernel_size[1]).mT.flatten(1)


def _batched_product(
    x_NCHW: Tensor, g_NOHW: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """One batched matrix product on the unfolded inputs of all samples."""
    a_NGPI = unpadded(stride, dilation, groups).unfold(x_NCHW, kernel_size)
    g_NGOP = g_NOHW.reshape(len(x_NCHW), groups, -1, g_NOHW[0, 0].numel())
    return (g_NGOP @ a_NGPI).flatten(1)


def _project_by_product(
    a: list[Tensor], g: list[Tensor], v: list[Tensor], blocks: list[int], shape: list[int]
) -> Tensor:  # fmt: skip
    y_LN = a[0].new_zeros(shape)
    for block, a_NGPI, g_NGPO, v_OTI in zip(blocks, a, g, v, strict=True):
        v_GOI = v_OTI.reshape(g_NGPO.shape[1], g_NGPO.shape[3], -1).to(y_LN.dtype)
        y_LN[block, : len(a_NGPI)] += ((a_NGPI @ v_GOI.mT) * g_NGPO).sum((1, 2, 3))
    return y_LN


OTHERS: Mapping[str, Mapping[str, Work]] = {
    "gram": {"einsum": _gram_by_einsum},
    "conv_sample_grads": {"grouped convolution": _grouped_convolution, "batched product": _batched_product},
    "gram_rows": {"stacked": _gram_of_stacked},
    "project": {"product": _project_by_product},
}


MATRIX_OPS = frozenset(
    ("gram", "gram_rows", "sample_grads", "conv_sample_grads", "project", "expand_update_", "project_conv")
) | {"expand_conv_update_"}
"""The ops that multiply matrices, in which torch can round to TF32."""
TF32 = ", TF32"
"""The end of the names of alternatives in which torch may round to TF32, which our kernels do not."""


def alternatives(spec: KernelSpec, compiled: bool, tf32: bool) -> dict[str, Work]:
    """Return the alternatives of a kernel, by name.

    Args:
        spec: the kernel.
        compiled: whether to have each of them compiled as well.
        tf32: whether to have each of them as well with TF32, where the kernel multiplies matrices.
    """
    works: dict[str, Work] = {"definition": spec.torch_impl, **OTHERS.get(spec.name, {})}
    if compiled:
        works |= {f"{name}, compiled": torch.compile(work, dynamic=False) for name, work in works.items()}
    if tf32 and spec.name in MATRIX_OPS:
        works |= {f"{name}{TF32}": with_tf32(work) for name, work in works.items()}
    return works


def with_tf32(work: Work) -> Work:
    """Return the same work with torch's matrix products and convolutions in TF32, on a GPU that has it."""

    def rounded(*arguments: Any) -> Any:
        with allowing_tf32(convolutions=True, products=True):
            return work(*arguments)

    return rounded
