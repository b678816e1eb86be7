"""A weight and its bias as one matrix, and what a Kronecker factorization of its Fisher block is made of.

Dimensions: N samples, G groups, P positions (pixels or tokens), R = N P of them over all samples, O outputs of a group,
I inputs of a group and, where there is a bias, the constant 1 that it multiplies behind them (homogeneous coordinate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.blocks import full_name
from tengrad_triton.layers import Explicit, Outer, Windows, matrix_view
from tengrad_triton.refresh import BlockUses

_CHUNK_BYTES = 256 * 2**20  # of unfolded inputs at a time


@dataclass(frozen=True)
class Layer:
    """A weight that multiplies what its layer sees, and the label of the bias added to its outputs, if there is one."""

    block: str
    weight: str
    bias: str | None

    @property
    def name(self) -> str:
        """Return the weight's full name."""
        return full_name(self.block, self.weight)

    @property
    def labels(self) -> list[str]:
        """Return the parameters' names within their block."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def layers_of(gathered: Mapping[str, BlockUses]) -> list[Layer]:
    """Return the layers that have Kronecker factors: every `Outer`, with the bias that is named after it."""
    return [
        Layer(name, label, _bias_of(label, block))
        for name, block in gathered.items()
        for label, uses in block.items()
        if isinstance(uses[0][0], Outer)
    ]


def _bias_of(label: str, block: BlockUses) -> str | None:
    name, weight = label.replace("weight", "bias"), block[label][0][0]
    if name == label or name not in block or not isinstance(weight, Outer):
        return None
    bias = block[name][0][0]
    outputs = weight.g_NGPO.shape[1] * weight.outputs
    return name if isinstance(bias, Explicit) and bias.j_NK[0].numel() == outputs else None


def chunks(layer: Layer, block: BlockUses, entries: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a_NGPI and g_NGPO of some samples at a time; several uses in one forward are further positions.

    ``entries`` is how many numbers the caller will form of each sample, beside these.
    """
    for batch in block[layer.weight]:
        outer = [use for use in batch if isinstance(use, Outer)]
        positions = sum(use.g_NGPO.shape[2] for use in outer)
        groups, g_NGPO = outer[0].g_NGPO.shape[1], outer[0].g_NGPO
        numbers = max(entries, groups * positions * (_inputs(outer[0]) + outer[0].outputs))
        size = max(1, _CHUNK_BYTES // (numbers * g_NGPO.element_size()))
        for start in range(0, len(g_NGPO), size):
            part = slice(start, start + size)
            a_NGPI = torch.cat([_unfolded(use, part) for use in outer], 2)
            yield F.pad(a_NGPI, (0, layer.bias is not None), value=1.0), torch.cat([u.g_NGPO[part] for u in outer], 2)


def _inputs(use: Outer) -> int:
    return use.a.inputs if isinstance(use.a, Windows) else use.a.shape[3]


def _unfolded(use: Outer, part: slice) -> Tensor:
    if isinstance(use.a, Windows):
        return replace(use.a, x_NCHW=use.a.x_NCHW[part]).unfold()
    return use.a[part]


@dataclass(frozen=True)
class Moments:
    """What one batch says of a layer.

    Attributes:
        a_GII: A = Σ_np a aᵀ / N, a sum over positions (Grosse and Martens 2016, equation 32).
        g_GOO: Γ = Σ_np g gᵀ / (N P), a mean over positions.
        mean_a_GI: the mean of a over samples and positions.
        mean_g_GO: the mean of g.
    """

    a_GII: Tensor
    g_GOO: Tensor
    mean_a_GI: Tensor
    mean_g_GO: Tensor


def moments(layer: Layer, block: BlockUses) -> Moments:
    """Return the moments of a batch."""
    samples, positions, sums = 0, 0, [torch.zeros(())] * 4
    for a_NGPI, g_NGPO in chunks(layer, block):
        a_GRI, g_GRO = (rows.transpose(0, 1).flatten(1, 2) for rows in (a_NGPI, g_NGPO))
        own = [a_GRI.mT @ a_GRI, g_GRO.mT @ g_GRO, a_GRI.sum(1), g_GRO.sum(1)]
        sums = own if not samples else [before.add_(part) for before, part in zip(sums, own, strict=True)]
        samples, positions = samples + len(a_NGPI), positions + a_GRI.shape[1]
    return Moments(sums[0] / samples, sums[1] / positions, sums[2] / positions, sums[3] / positions)


def joined(layer: Layer, tensors: Mapping[str, Tensor], like_GOI: tuple[int, torch.dtype]) -> Tensor:
    """Return v_GOI, made of parameter-shaped tensors by their labels; ``like_GOI`` is G and the dtype."""
    groups, dtype = like_GOI
    weight_OKI = matrix_view(tensors[layer.weight])
    parts = [weight_OKI.reshape(groups, weight_OKI.shape[0] // groups, -1)]
    if layer.bias is not None:
        parts.append(tensors[layer.bias].reshape(groups, -1, 1))
    return torch.cat(parts, 2).to(dtype)


def parted(layer: Layer, v_GOI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameter-shaped tensors that `joined` would make ``v_GOI`` of."""
    parts = {label: torch.empty_like(like[label]) for label in layer.labels}
    weight_OKI = matrix_view(parts[layer.weight])
    inputs = weight_OKI.shape[1] * weight_OKI.shape[2]
    weight_OKI.copy_(v_GOI[..., :inputs].reshape(weight_OKI.shape))
    if layer.bias is not None:
        parts[layer.bias].copy_(v_GOI[..., inputs].reshape(parts[layer.bias].shape))
    return parts


Batched = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From matrices B×n×n to as many others, and which of them failed."""


def in_batches(matrices: Sequence[Tensor], work: Batched) -> tuple[list[Tensor], Tensor]:
    """Return ``work`` of all matrices, each a stack [G, n, n], and how many failed: those of one size in one call."""
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    failures = torch.zeros((), dtype=torch.long)
    for size in sorted({len(matrix[0]) for matrix in matrices}):
        members = [index for index, matrix in enumerate(matrices) if len(matrix[0]) == size]
        done, failed_B = work(torch.cat([matrices[index] for index in members]))
        for index, part in zip(members, done.split([len(matrices[index]) for index in members]), strict=True):
            results[index] = part
        failures = failures.to(failed_B.device) + failed_B.sum()
    return results, failures


def inverse(matrix_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of positive definite matrices; of one that rounding made indefinite, I / trace instead.

    No eigenvalue is above the trace, so that such a step is no longer than the true one in any direction.
    """
    factor_BII, info_B = torch.linalg.cholesky_ex(matrix_BII)
    failed_B = info_B != 0
    trace_B = matrix_BII.diagonal(dim1=1, dim2=2).sum(1)
    eye_II = torch.eye(matrix_BII.shape[1], dtype=matrix_BII.dtype, device=matrix_BII.device)
    safe_BII = torch.where(failed_B[:, None, None], eye_II, factor_BII)
    return torch.where(
        failed_B[:, None, None], eye_II / trace_B[:, None, None], torch.cholesky_inverse(safe_BII)
    ), failed_B


def eigenbasis(matrix_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of symmetric matrices, as columns; of one that is not finite, the identity."""
    failed_B = ~matrix_BII.isfinite().flatten(1).all(1)
    eye_II = torch.eye(matrix_BII.shape[1], dtype=matrix_BII.dtype, device=matrix_BII.device)
    return torch.linalg.eigh(torch.where(failed_B[:, None, None], eye_II, matrix_BII)).eigenvectors, failed_B


def shifted(matrix_GII: Tensor, shift_G: Tensor) -> Tensor:
    """Return each matrix with its own number added to the diagonal."""
    result_GII = matrix_GII.clone()
    result_GII.diagonal(dim1=1, dim2=2).add_(shift_G[:, None])
    return result_GII
