"""The Kronecker factors of a layer from one batch, and its mean input and output gradient (docs/math.md, M15).

Dimensions: N samples, G groups, P positions (pixels or tokens), R = N P positions of all samples, O outputs and I
inputs of a group, including the constant 1 of a bias (see `kronecker`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.baselines.kronecker import LayerBatch
from tengrad_triton.layers import ConvInput, OuterProducts

_CHUNK_BYTES = 256 * 2**20  # the memory for the inputs that are unfolded at a time


def input_factor(batch: LayerBatch) -> Tensor:
    """Return a_GII, A = Σ_np a_np a_npᵀ / N: a sum over positions, a mean over samples.

    Source: Grosse and Martens 2016, equation 32.
    """
    samples, positions, total_GII = 0, 0, torch.zeros(())
    for a_NGPI, _ in chunks(batch, 0):
        own_GII = _sum_of_squares(a_NGPI)
        total_GII = total_GII.add_(own_GII) if samples else own_GII
        samples, positions = samples + len(a_NGPI), positions + a_NGPI.shape[0] * a_NGPI.shape[2]
    if batch.layer.bias is not None:
        sum_G1I = positions * mean_input_and_grad(batch)[0][:, None]
        total_GII = torch.cat([torch.cat([total_GII, sum_G1I[..., :-1].mT], 2), sum_G1I], 1)
    return total_GII / samples


def output_factor(batch: LayerBatch) -> Tensor:
    """Return g_GOO, Γ = Σ_np g_np g_npᵀ / R: a mean over samples and positions.

    Source: Grosse and Martens 2016.
    """
    return torch.stack([_sum_of_squares(call.g_NGPO) for call in batch.calls]).sum(0) / _positions(batch)


def mean_input_and_grad(batch: LayerBatch) -> tuple[Tensor, Tensor]:
    """Return the means of a_np and g_np over samples and positions: [G, I] and [G, O]."""
    # Unfolding is linear: the unfolded sum of all images is the sum of the unfolded images.
    summed = [
        replace(call.a, x_NCHW=call.a.x_NCHW.sum(0, True)).unfold() if isinstance(call.a, ConvInput) else call.a
        for call in batch.calls
    ]
    mean_a_GI = torch.stack([a_NGPI.sum((0, 2)) for a_NGPI in summed]).sum(0) / _positions(batch)
    mean_g_GO = torch.stack([call.g_NGPO.sum((0, 2)) for call in batch.calls]).sum(0) / _positions(batch)
    return F.pad(mean_a_GI, (0, batch.layer.bias is not None), value=1.0), mean_g_GO


def chunks(batch: LayerBatch, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a_NGPI, without the constant 1, and g_NGPO for some samples at a time, to bound the memory.

    The positions of a micro-batch's calls are joined along P.

    Args:
        batch: the calls of one layer.
        entries: how many numbers the caller computes for each sample; 0 if they are fewer than those of a and g.
    """
    for calls in batch.micro_batches:
        g_NGPO = calls[0].g_NGPO
        groups, outputs = g_NGPO.shape[1], calls[0].outputs
        inputs = calls[0].entries // (groups * outputs)
        positions = sum(call.g_NGPO.shape[2] for call in calls)
        numbers = max(entries, groups * positions * (inputs + outputs))
        size = max(1, _CHUNK_BYTES // (numbers * g_NGPO.element_size()))
        for start in range(0, len(g_NGPO), size):
            samples = slice(start, start + size)
            a, g = [_unfolded(call, samples) for call in calls], [call.g_NGPO[samples] for call in calls]
            yield (a[0], g[0]) if len(calls) == 1 else (torch.cat(a, 2), torch.cat(g, 2))


def _unfolded(call: OuterProducts, samples: slice) -> Tensor:
    """Return a_NGPI of the given samples."""
    if isinstance(call.a, ConvInput):
        return replace(call.a, x_NCHW=call.a.x_NCHW[samples]).unfold()
    return call.a[samples]


def _positions(batch: LayerBatch) -> int:
    """Return R, the number of positions of all samples and calls."""
    return sum(call.g_NGPO.shape[0] * call.g_NGPO.shape[2] for call in batch.calls)


def _sum_of_squares(x_NGPI: Tensor) -> Tensor:
    """Return Σ_np x_np x_npᵀ: [G, I, I]."""
    x_GRI = x_NGPI.transpose(0, 1).flatten(1, 2)
    return x_GRI.mT @ x_GRI if len(x_GRI) > 1 else (x_GRI[0].mT @ x_GRI[0])[None]
