"""Sums over the samples with random weights: Σ_n r_n J_n, which autograd gives in one backward pass.

A plain sum would not show rows that belong to other samples. How precisely two such sums agree depends on the type in
which products are computed. Dimensions: see `tengrad_triton.layers.contribution`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, PerSampleGrads, flatten_rows, matrix_view


def random_weights(count: int, like: Tensor) -> Tensor:
    """Return ``count`` normally distributed numbers, always the same, on the device of ``like``."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.to(like.device, like.dtype)


def multiply_samples(weights_N: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` [N, …] with the entries of each sample n multiplied by weight n."""
    return weights_N.to(x.dtype).view(-1, *(1 for _ in x.shape[1:])) * x


def weighted_sum(contribution: Contribution, weights_N: Tensor) -> Tensor:
    """Return Σ_n r_n J_n [K] of what one call contributes to one parameter, in the order of `matrix_view`."""
    if isinstance(contribution, PerSampleGrads):
        rows_NK = flatten_rows(contribution.j_NK)
        return weights_N.to(rows_NK.dtype) @ rows_NK
    if isinstance(contribution, EmbeddingGrads):
        weighted = multiply_samples(weights_N, contribution.g_NPD).flatten(0, 1)
        table = weighted.new_zeros(contribution.num_embeddings, weighted.shape[1])
        return table.index_add_(0, contribution.ids_NP.flatten(), weighted).flatten()
    outer = contribution.widened()
    g_NGPO = multiply_samples(weights_N, outer.g_NGPO)
    if not isinstance(outer.a, ConvInput):
        return torch.einsum("ngpo,ngpi->goi", g_NGPO, outer.a).flatten()
    g_NOHW, geometry = type(outer)(outer.a, g_NGPO).g_NOHW(outer.a), outer.a.geometry
    channels = outer.a.x_NCHW.shape[1] // geometry.groups
    grad = geometry.weight_grad(outer.a.x_NCHW, g_NOHW, [g_NOHW.shape[1], channels, *outer.a.kernel_size])
    return matrix_view(grad).flatten()


def precision_of(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative precision of a product in ``dtype``; on a GPU float32 products may be in TF32."""
    eps = torch.finfo(dtype).eps
    return max(eps, 2.0**-10) if device.type == "cuda" and dtype == torch.float32 else eps
