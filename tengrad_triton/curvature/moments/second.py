"""Second moments of what one refresh contributes to the rows of a parameter: those of both sides of D (math.md, M17).

Dimensions: G groups, O outputs and I inputs of a group, T taps of a convolution's kernel, C channels of a group and S
pixels of an image, N samples, P positions, K entries of a flat gradient; B calls in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.sides import places_of_alike
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import (
    Contribution,
    ConvInput,
    EmbeddingGrads,
    OuterProducts,
    PerSampleGrads,
    flatten_rows,
    matrix_shape,
)

LARGEST = 128  # a side with more entries is diagonal: its matrix would cost more than it gains
STACKED = 2**16  # explicit rows with more entries are not copied to be squared in one call with others

Pair = tuple[Tensor, Tensor]
"""Second moments of the outputs of each group, [G, O, O] or their diagonals [G, O], and likewise of the inputs."""


class Form(NamedTuple):
    """What the second moments of a parameter look like.

    Attributes:
        rows_are_matrices: whether those of the outputs are matrices.
        columns_are_matrices: whether those of the inputs are.
        groups: G.
        outputs: O of a group.
        inputs: I.
    """

    rows_are_matrices: bool
    columns_are_matrices: bool
    groups: int
    outputs: int
    inputs: int


def form_of(
    batches: MicroBatches, parameter: Tensor, side_share: float, were_matrices: tuple[bool, bool] = (False, False)
) -> Form:
    """Return which second moments are matrices, by their numbers; once so, for good.

    With a matrix of n entries D⁻¹ V takes 2 n flops for each entry of V; SGD's step takes 6 N P.

    Args:
        batches: what contributes to the rows.
        parameter: a tensor of its shape.
        side_share: what a matrix may cost, as a share of SGD's step; all sides are diagonal with 0.
        were_matrices: those of earlier refreshes.
    """
    all_outputs, _, inputs = matrix_shape(parameter.shape)
    calls = [call for calls in batches for call in calls]
    outers = [call for call in calls if isinstance(call, OuterProducts)]
    embeddings = [call for call in calls if isinstance(call, EmbeddingGrads)]
    groups = outers[0].g_NGPO.shape[1] if outers else 1
    sizes = groups, all_outputs // groups, inputs
    if not outers and not embeddings:
        return Form(False, False, *sizes)
    positions = sum(call.samples * call.g_NGPO.shape[2] for call in outers) + sum(c.ids_NP.numel() for c in embeddings)
    most = min(LARGEST, math.floor(3 * positions * side_share))
    rows = were_matrices[0] or (not embeddings and 1 < sizes[1] <= most)
    return Form(rows, were_matrices[1] or 1 < inputs <= most, *sizes)


def second_moments(parameters: Sequence[tuple[MicroBatches, Form]]) -> list[list[Pair]]:
    """Return the sums over samples of the second moments of both sides, for each call of every parameter.

    The Kronecker product of their means over samples is the second moment of the rows if inputs are independent of
    output gradients, and both of those at other positions (M15). Micro-batches are one batch: each call's moments are
    those of all of them, before different calls are added.
    """
    pairs = iter(_of_calls([(call, form) for batches, form in parameters for calls in batches for call in calls]))
    found = []
    for batches, _ in parameters:
        parts = [[(call, next(pairs)) for call in calls] for calls in batches]
        found.append([_of_batches(list(filter(None, own))) for own in zip_longest(*parts)])
    return found


def _of_batches(parts: Sequence[tuple[Contribution, Pair]]) -> Pair:
    """Return the sums over micro-batches."""
    if len(parts) == 1:
        return parts[0][1]
    explicit = [(call.samples, *pair) for call, pair in parts if isinstance(call, PerSampleGrads)]
    others = [pair for call, pair in parts if not isinstance(call, PerSampleGrads)]
    return sum_of([_of_all_rows(explicit), *others] if explicit else others)


def _of_all_rows(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Pair:
    """Return what `_of_rows` returns for the rows of all parts (samples, rows, columns), from what it did for each."""
    squares = [(rows.diagonal(dim1=1, dim2=2) if rows.dim() == 3 else rows).sum() for _, rows, _ in parts]
    columns = _sum([x * (square / n) for (n, _, x), square in zip(parts, squares, strict=True)])
    share = columns / _sum(squares).clamp(min=torch.finfo(columns.dtype).tiny)
    return _sum([rows for _, rows, _ in parts]), share * sum(n for n, _, _ in parts)


def sum_of(pairs: Sequence[Pair]) -> Pair:
    """Return the sums of both sides."""
    if len(pairs) == 1:
        return pairs[0]
    rows, columns = zip(*pairs, strict=True)
    return _sum(rows), _sum(columns)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts)).sum(0)


def _of_calls(calls: Sequence[tuple[Contribution, Form]]) -> list[Pair]:
    """Return the second moments of single calls; small explicit rows of one size take one call together."""
    made: dict[int, Pair] = {}
    explicit: list[int] = []
    keys: list[Hashable] = []
    for place, (call, form) in enumerate(calls):
        if isinstance(call, OuterProducts):
            made[place] = _over(_of_outer_products(call, form), math.sqrt(call.g_NGPO.shape[2]))
        elif isinstance(call, EmbeddingGrads):
            made[place] = _over(_of_embedding(call, form), math.sqrt(call.ids_NP.shape[1]))
        else:
            alone = (place,) if call.j_NK.numel() > STACKED else ()
            keys.append((*form, *call.j_NK.shape, call.j_NK.dtype, call.j_NK.device, *alone))
            explicit.append(place)
    for own in places_of_alike(keys):
        places = [explicit[index] for index in own]
        rows = [call.j_NK for call, _ in (calls[place] for place in places) if isinstance(call, PerSampleGrads)]
        made |= zip(places, _of_rows([flatten_rows(j_NK) for j_NK in rows], calls[places[0]][1]), strict=True)
    return [made[place] for place in range(len(calls))]


def _over(pair: Pair, number: float) -> Pair:
    return pair if number == 1 else (pair[0] / number, pair[1] / number)


def _of_outer_products(outer: OuterProducts, form: Form) -> Pair:
    """Return Σ_np g gᵀ and Σ_np a aᵀ of each group; a convolution's sum over its taps too, or over the pixels."""
    outer, is_matrix = outer.widened(), form.columns_are_matrices
    rows = _moment(outer.g_NGPO, form.rows_are_matrices)
    if not isinstance(outer.a, ConvInput):
        return rows, _moment(outer.a.unflatten(3, (-1, form.inputs)).flatten(2, 3), is_matrix)
    x_NGCS = outer.a.x_NCHW.flatten(2).unflatten(1, (-1, form.inputs))
    taps, positions = outer.a.inputs // form.inputs, outer.g_NGPO.shape[2]
    moment = (x_NGCS @ x_NGCS.mT).sum(0) if is_matrix else x_NGCS.square().sum((0, 3))
    return rows, moment * (taps * positions / x_NGCS.shape[3])


def _of_embedding(embedding: EmbeddingGrads, form: Form) -> Pair:
    """Return how often each vector was read, and Σ_np g gᵀ."""
    g_NPD = widen(embedding.g_NPD)  # half precision counts to 256 or 2048 only
    ones = g_NPD.new_ones(embedding.ids_NP.numel())
    counts = g_NPD.new_zeros(embedding.num_embeddings).index_add_(0, embedding.ids_NP.flatten(), ones)
    rows = counts.diag() if form.rows_are_matrices else counts
    return rows.unsqueeze(0), _moment(g_NPD.unsqueeze(1), form.columns_are_matrices)


def _moment(x_NGPI: Tensor, is_matrix: bool) -> Tensor:
    """Return Σ_np x xᵀ of each group [G, I, I], or its diagonal [G, I]."""
    if not is_matrix:
        return x_NGPI.square().sum((0, 2))
    x_GRI = x_NGPI.transpose(0, 1).flatten(1, 2)
    return x_GRI.mT @ x_GRI


def _of_rows(rows: Sequence[Tensor], form: Form) -> list[Pair]:
    """Return Σ_n of the squares of J_n, summed over its inputs, and over its outputs as a share of all, times N."""
    j_BNK = widen(torch.stack(list(rows)) if len(rows) > 1 else rows[0].unsqueeze(0))
    squares_BGOTI = j_BNK.square().sum(1).view(len(rows), form.groups, form.outputs, -1, form.inputs)
    columns_BGI = squares_BGOTI.sum((2, 3))
    total_B = columns_BGI.sum((1, 2), keepdim=True)
    share_BGI = columns_BGI / total_B.clamp(min=torch.finfo(total_B.dtype).tiny)  # all rows may be zero
    sides = squares_BGOTI.sum((3, 4)), share_BGI * j_BNK.shape[1]
    full = form.rows_are_matrices, form.columns_are_matrices
    rows_B, columns_B = (x.diag_embed() if matrix else x for x, matrix in zip(sides, full, strict=True))
    return list(zip(rows_B.unbind(), columns_B.unbind(), strict=True))
