"""Selecting and joining what the calls of a layer contribute to the rows of one parameter.

Dimensions: N samples, P positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, OuterProducts, PerSampleGrads, tensors_in

MicroBatches = Sequence[Sequence[Contribution]]
"""What the calls of a step contribute to one parameter: a sequence for each micro-batch, an entry for each call in it.

Calls within a micro-batch add up; the samples of micro-batches follow each other.
"""


def can_be_joined(batches: MicroBatches) -> bool:
    """Whether micro-batches have calls of the same types and sizes, apart from their numbers of samples."""
    return len({tuple(map(_form_of, calls)) for calls in batches}) == 1


def join_batches(batches: MicroBatches) -> Sequence[Contribution]:
    """Return micro-batches that `can_be_joined` as one, their samples in turn."""
    return batches[0] if len(batches) == 1 else [_join(calls) for calls in zip(*batches, strict=True)]


def _form_of(call: Contribution) -> Hashable:
    tensors = tensors_in(list(vars(call).values()))
    sizes = tuple((x.shape[1:], x.dtype) for x in tensors)
    if isinstance(call, EmbeddingGrads):
        return EmbeddingGrads, call.num_embeddings, sizes
    if isinstance(call, OuterProducts) and isinstance(call.a, ConvInput):
        image = call.a.x_NCHW
        return ConvInput, (image.shape[1:], image.dtype), *call.a.kernel_size, call.a.geometry, sizes
    return type(call), sizes


def _join(calls: Sequence[Contribution]) -> Contribution:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(call, name) for call in calls])

    first = calls[0]
    if isinstance(first, PerSampleGrads):
        return PerSampleGrads(cat("j_NK"))
    if isinstance(first, EmbeddingGrads):
        return replace(first, ids_NP=cat("ids_NP"), g_NPD=cat("g_NPD"))
    image = _concat_conv_inputs([call.a for call in calls if isinstance(call, OuterProducts)])
    return OuterProducts(cat("a") if image is None else image, cat("g_NGPO"))


def take_rows(contribution: Contribution, rows: Tensor) -> Contribution:
    """Return the contribution to some of the rows, given by their indices."""
    if isinstance(contribution, PerSampleGrads):
        return PerSampleGrads(contribution.j_NK[rows])
    if isinstance(contribution, EmbeddingGrads):
        return take_embedding_rows(contribution, rows)
    return take_outer_rows(contribution, rows)


def in_float64(contribution: Contribution) -> Contribution:
    """Return the contribution in float64."""
    if isinstance(contribution, PerSampleGrads):
        return PerSampleGrads(contribution.j_NK.double())
    if isinstance(contribution, EmbeddingGrads):
        return replace(contribution, g_NPD=contribution.g_NPD.double())
    a = contribution.a
    wide = replace(a, x_NCHW=a.x_NCHW.double()) if isinstance(a, ConvInput) else a.double()
    return OuterProducts(wide, contribution.g_NGPO.double())


def take_embedding_rows(embedding: EmbeddingGrads, rows: Tensor) -> EmbeddingGrads:
    """Return an embedding's contribution to some of the rows of J."""
    return replace(embedding, ids_NP=embedding.ids_NP[rows], g_NPD=embedding.g_NPD[rows])


def take_outer_rows(outer: OuterProducts, rows: Tensor) -> OuterProducts:
    """Return the outer products of some of the rows."""
    a = replace(outer.a, x_NCHW=outer.a.x_NCHW[rows]) if isinstance(outer.a, ConvInput) else outer.a[rows]
    return OuterProducts(a, outer.g_NGPO[rows])


def concat_outer(batches: Sequence[Sequence[OuterProducts]]) -> OuterProducts:
    """Return all calls as one, in float32 at least: joined along P within a micro-batch, along N between them.

    Where micro-batches have different numbers of positions, zeros fill up the shorter ones.
    """
    batches = [[outer.widened() for outer in batch] for batch in batches]
    if len(batches) == 1 and len(batches[0]) == 1:
        return batches[0][0]
    if all(len(batch) == 1 for batch in batches):
        conv_input = _concat_conv_inputs([batch[0].a for batch in batches])
        if conv_input is not None:
            return OuterProducts(conv_input, torch.cat([batch[0].g_NGPO for batch in batches]))
    unfolded = [[outer.a.unfold() if isinstance(outer.a, ConvInput) else outer.a for outer in b] for b in batches]
    a = [torch.cat(batch, dim=2) for batch in unfolded]
    g = [torch.cat([outer.g_NGPO for outer in batch], dim=2) for batch in batches]
    return OuterProducts(_concat_padded(a), _concat_padded(g))


def _concat_conv_inputs(inputs: Sequence[Tensor | ConvInput]) -> ConvInput | None:
    """Return the images of all micro-batches as one; None if one is no image, or if their sizes differ."""
    convs = [a for a in inputs if isinstance(a, ConvInput)]
    if len(convs) < len(inputs) or len({conv.x_NCHW.shape[1:] for conv in convs}) > 1:
        return None
    return replace(convs[0], x_NCHW=torch.cat([conv.x_NCHW for conv in convs]))


def concat_embedding(batches: Sequence[Sequence[EmbeddingGrads]]) -> EmbeddingGrads:
    """Return all calls of an embedding as one, joined as in `concat_outer`."""
    ids = [torch.cat([call.ids_NP for call in batch], 1) for batch in batches]
    g = [torch.cat([call.g_NPD for call in batch], 1) for batch in batches]
    positions = max(part.shape[1] for part in ids)
    ids_NP = torch.cat([F.pad(part, (0, positions - part.shape[1])) for part in ids])
    return EmbeddingGrads(ids_NP, _concat_padded(g), batches[0][0].num_embeddings)


def _concat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [N, …, P, I] joined along N, each with zeros up to the largest P."""
    positions = max(part.shape[-2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, positions - part.shape[-2])) for part in parts])
