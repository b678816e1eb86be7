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

from tengrad_triton.capture.blocks import full_name
from tengrad_triton.curvature.refresh import BlockUses
from tengrad_triton.layers import Contribution, ConvInput, OuterProducts, PerSampleGrads, matrix_view

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


def layers_of(gathered: Mapping[str, BlockUses], known: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers that have Kronecker factors: weights all of whose uses are `OuterProducts`, with their biases.

    A layer that is among those ``known`` stays as it is there, as long as it has the same parameters.
    """
    found = []
    for name, block in gathered.items():
        for label, uses in block.items():
            sizes = {_sizes(use) for batch in uses for use in batch}
            if len(sizes) == 1 and None not in sizes:
                before = known.get(full_name(name, label))
                same = before is not None and set(before.labels) <= set(block)
                found.append(before if before is not None and same else Layer(name, label, _bias_of(label, block)))
    return found


def _sizes(use: Contribution) -> tuple[int, int, int] | None:
    """Return G, O and I; None of what is no outer product."""
    return (use.g_NGPO.shape[1], use.outputs, _inputs(use)) if isinstance(use, OuterProducts) else None


def _bias_of(label: str, block: BlockUses) -> str | None:
    """Return the label of the bias named after a weight, if its rows are what the weight's g add up to.

    They are not where a weight is shared by layers with biases of their own, nor in a transposed convolution, which has
    the derivatives of its output for a.
    """
    name = label.replace("weight", "bias")
    if name == label or name not in block:
        return None
    g, rows = [use.g_NGPO for use in block[label][0] if isinstance(use, OuterProducts)], block[name][0]
    if not all(isinstance(use, PerSampleGrads) and use.entries == g[0].shape[1] * g[0].shape[3] for use in rows):
        return None
    j_NK = torch.stack([use.j_NK.flatten(1) for use in rows if isinstance(use, PerSampleGrads)]).sum(0)
    sum_NK, size_NK = _summed(g), _summed([g_NGPO.abs() for g_NGPO in g])
    # The square root of the precision: far above rounding, far below another quantity. Not a number is no refusal.
    far = (j_NK - sum_NK).abs() > torch.finfo(j_NK.dtype).eps ** 0.5 * size_NK
    return None if far.any() else name


def _summed(g: Sequence[Tensor]) -> Tensor:
    """Return Σ_p g_np over all uses, a flat row a sample."""
    return torch.stack([g_NGPO.sum(2).flatten(1) for g_NGPO in g]).sum(0)


def chunks(layer: Layer, block: BlockUses, entries: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a_NGPI, without the constant, and g_NGPO of some samples at a time; further uses are further positions.

    ``entries`` is how many numbers the caller will form of each sample, beside these.
    """
    for batch in block[layer.weight]:
        outer = [use for use in batch if isinstance(use, OuterProducts)]
        positions = sum(use.g_NGPO.shape[2] for use in outer)
        groups, g_NGPO = outer[0].g_NGPO.shape[1], outer[0].g_NGPO
        numbers = max(entries, groups * positions * (_inputs(outer[0]) + outer[0].outputs))
        size = max(1, _CHUNK_BYTES // (numbers * g_NGPO.element_size()))
        for start in range(0, len(g_NGPO), size):
            part = slice(start, start + size)
            a, g = [_unfolded(use, part) for use in outer], [use.g_NGPO[part] for use in outer]
            yield (a[0], g[0]) if len(outer) == 1 else (torch.cat(a, 2), torch.cat(g, 2))


def _inputs(use: OuterProducts) -> int:
    return use.a.inputs if isinstance(use.a, ConvInput) else use.a.shape[3]


def _unfolded(use: OuterProducts, part: slice) -> Tensor:
    if isinstance(use.a, ConvInput):
        return replace(use.a, x_NCHW=use.a.x_NCHW[part]).unfold()
    return use.a[part]


def input_factor(layer: Layer, block: BlockUses) -> Tensor:
    """Return a_GII, A = Σ_np a aᵀ / N of a batch: a sum over positions (Grosse and Martens 2016, equation 32)."""
    samples, rows, total_GII = 0, 0, torch.zeros(())
    for a_NGPI, _ in chunks(layer, block):
        own_GII = _square(a_NGPI)
        total_GII = total_GII.add_(own_GII) if samples else own_GII
        samples, rows = samples + len(a_NGPI), rows + a_NGPI.shape[0] * a_NGPI.shape[2]
    if layer.bias is not None:
        last_G1I = rows * means(layer, block)[0][:, None]
        total_GII = torch.cat([torch.cat([total_GII, last_G1I[..., :-1].mT], 2), last_G1I], 1)
    return total_GII / samples


def output_factor(layer: Layer, block: BlockUses) -> Tensor:
    """Return g_GOO, Γ = Σ_np g gᵀ / (N P) of a batch: a mean over positions."""
    uses = _outer(layer, block)
    return torch.stack([_square(use.g_NGPO) for use in uses]).sum(0) / _rows(uses)


def means(layer: Layer, block: BlockUses) -> tuple[Tensor, Tensor]:
    """Return the means of a and g over samples and positions, a_GI and g_GO."""
    uses = _outer(layer, block)
    # Unfolding is linear: one image, the sum of all, is unfolded in place of all of them.
    sums = [replace(u.a, x_NCHW=u.a.x_NCHW.sum(0, True)).unfold() if isinstance(u.a, ConvInput) else u.a for u in uses]
    mean_a_GI = torch.stack([a_NGPI.sum((0, 2)) for a_NGPI in sums]).sum(0) / _rows(uses)
    mean_g_GO = torch.stack([use.g_NGPO.sum((0, 2)) for use in uses]).sum(0) / _rows(uses)
    return F.pad(mean_a_GI, (0, layer.bias is not None), value=1.0), mean_g_GO


def _outer(layer: Layer, block: BlockUses) -> list[OuterProducts]:
    return [use for batch in block[layer.weight] for use in batch if isinstance(use, OuterProducts)]


def _rows(uses: Sequence[OuterProducts]) -> int:
    """Return R."""
    return sum(use.g_NGPO.shape[0] * use.g_NGPO.shape[2] for use in uses)


def _square(x_NGPK: Tensor) -> Tensor:
    """Return Σ_np x xᵀ."""
    x_GRK = x_NGPK.transpose(0, 1).flatten(1, 2)
    return x_GRK.mT @ x_GRK if len(x_GRK) > 1 else (x_GRK[0].mT @ x_GRK[0])[None]


def concat(layer: Layer, tensors: Mapping[str, Tensor], like_GOI: tuple[int, torch.dtype]) -> Tensor:
    """Return v_GOI, made of parameter-shaped tensors by their labels; ``like_GOI`` is G and the dtype."""
    groups, dtype = like_GOI
    weight_OKI = matrix_view(tensors[layer.weight])
    parts = [weight_OKI.reshape(groups, weight_OKI.shape[0] // groups, -1)]
    if layer.bias is not None:
        parts.append(tensors[layer.bias].reshape(groups, -1, 1))
    return torch.cat(parts, 2).to(dtype)


def parted(layer: Layer, v_GOI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameter-shaped tensors that `concat` would make ``v_GOI`` of."""
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
        stacks = [matrices[index] for index in members]
        done, failed_B = work(stacks[0] if len(stacks) == 1 else torch.cat(stacks))
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
    factor_BII.masked_fill_(failed_B[:, None, None], 0.0).diagonal(dim1=1, dim2=2).masked_fill_(failed_B[:, None], 1.0)
    trace_B = matrix_BII.diagonal(dim1=1, dim2=2).sum(1)
    return torch.cholesky_inverse(factor_BII).div_(torch.where(failed_B, trace_B, 1.0)[:, None, None]), failed_B


def eigenbasis(matrix_BII: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of symmetric matrices, as columns; of one that is not finite, the identity."""
    failed_B = ~matrix_BII.isfinite().flatten(1).all(1)
    safe_BII = matrix_BII.masked_fill(failed_B[:, None, None], 0.0)
    if matrix_BII.device.type == "cpu":  # LAPACK's single precision gives up, or NaN, where the rank is low
        safe_BII = safe_BII.double()
    return torch.linalg.eigh(safe_BII).eigenvectors.to(matrix_BII.dtype), failed_B


def shifted(matrix_GII: Tensor, shift_G: Tensor) -> Tensor:
    """Return each matrix with its own number added to the diagonal."""
    result_GII = matrix_GII.clone()
    result_GII.diagonal(dim1=1, dim2=2).add_(shift_G[:, None])
    return result_GII
