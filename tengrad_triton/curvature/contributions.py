"""What the calls of a layer contribute to one parameter: their sizes, a part of their rows, and all of them as one.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; V rows of a table, D entries of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, OuterProducts, PerSampleGrads

Contributions = Sequence[Sequence[Contribution]]
"""What each micro-batch of a step contributes to one parameter: a list a micro-batch, an entry a use within it."""


def geometry_of(outer: OuterProducts) -> Geometry:
    """Return the sizes that the choice of a representation looks at."""
    n, groups, positions, outputs = outer.g_NGPO.shape
    a, itemsize = outer.a, outer.g_NGPO.itemsize
    if isinstance(a, ConvInput):
        slides = a.geometry
        sizes = f"{a.kernel_size} stride {slides.stride} padding {slides.padding} dilation {slides.dilation}"
        layout = f"conv {sizes} of {list(a.x_NCHW.shape[2:])}"
        inputs, stored = a.inputs, a.x_NCHW.nbytes
    else:
        layout, inputs, stored = "dense", a.shape[-1], a.nbytes
    return Geometry(n, groups, positions, inputs, outputs, itemsize, stored + outer.g_NGPO.nbytes, layout)


def geometry_of_uses(batch: Sequence[Contribution]) -> Geometry | None:
    """Return the sizes of one micro-batch's uses; None where they are explicit rows, which leave no choice."""
    if any(isinstance(use, PerSampleGrads) for use in batch):
        return None
    outers = [geometry_of(use) for use in batch if isinstance(use, OuterProducts)]
    tables = [use for use in batch if isinstance(use, EmbeddingGrads)]
    if not tables:
        return outers[0]
    n, _, entries = tables[0].g_NPD.shape
    positions = sum(use.ids_NP.shape[1] for use in tables)
    stored = sum(use.ids_NP.nbytes + use.g_NPD.nbytes for use in tables) + sum(outer.factored_bytes for outer in outers)
    return Geometry(n, 1, positions, entries, tables[0].num_embeddings, tables[0].g_NPD.itemsize, stored, "table")


def rows_in(use: Contribution) -> int:
    """Return how many samples a use is of."""
    if isinstance(use, PerSampleGrads):
        return len(use.j_NK)
    return len(use.ids_NP if isinstance(use, EmbeddingGrads) else use.g_NGPO)


def take_rows(use: Contribution, rows: Tensor) -> Contribution:
    """Return some of a use's rows."""
    if isinstance(use, PerSampleGrads):
        return PerSampleGrads(use.j_NK[rows])
    if isinstance(use, EmbeddingGrads):
        return EmbeddingGrads(use.ids_NP[rows], use.g_NPD[rows], use.num_embeddings)
    a = replace(use.a, x_NCHW=use.a.x_NCHW[rows]) if isinstance(use.a, ConvInput) else use.a[rows]
    return OuterProducts(a, use.g_NGPO[rows])


def concat(uses: Sequence[Sequence[OuterProducts]]) -> OuterProducts:
    """Return one outer product for all uses: along P within a micro-batch, along N between them (P padded by zeros)."""
    if len(uses) == 1 and len(uses[0]) == 1:
        return uses[0][0]
    if all(len(batch) == 1 for batch in uses) and (windows := _same_windows([batch[0].a for batch in uses])):
        return OuterProducts(windows, torch.cat([batch[0].g_NGPO for batch in uses]))
    unfolded = [[use.a.unfold() if isinstance(use.a, ConvInput) else use.a for use in batch] for batch in uses]
    a = [torch.cat(batch, dim=2) for batch in unfolded]
    g = [torch.cat([use.g_NGPO for use in batch], dim=2) for batch in uses]
    positions = max(part.shape[2] for part in a)
    return OuterProducts(*(torch.cat([F.pad(t, (0, 0, 0, positions - t.shape[2])) for t in parts]) for parts in (a, g)))


def _same_windows(views: Sequence[Tensor | ConvInput]) -> ConvInput | None:
    """Return one view of all samples, where all are the same windows of images of one size."""
    first = views[0]
    if not isinstance(first, ConvInput) or not all(isinstance(view, ConvInput) for view in views):
        return None
    alike = {view.x_NCHW.shape[1:] for view in views}  # type: ignore[union-attr]
    return replace(first, x_NCHW=torch.cat([view.x_NCHW for view in views])) if len(alike) == 1 else None  # type: ignore[union-attr]


def concat_embedding(uses: Sequence[Sequence[EmbeddingGrads]]) -> EmbeddingGrads:
    """Return one lookup for all uses, as `concat` does."""
    ids = [torch.cat([use.ids_NP for use in batch], 1) for batch in uses]
    g = [torch.cat([use.g_NPD for use in batch], 1) for batch in uses]
    positions = max(part.shape[1] for part in ids)
    padded = [F.pad(part, (0, positions - part.shape[1])) for part in ids]
    return EmbeddingGrads(
        torch.cat(padded),
        torch.cat([F.pad(part, (0, 0, 0, positions - part.shape[1])) for part in g]),
        uses[0][0].num_embeddings,
    )
