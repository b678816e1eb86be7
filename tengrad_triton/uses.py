"""What the calls of a layer contribute to one parameter: their sizes, a part of their rows, and all of them as one.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group; V rows of a table, D entries of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.layers import Explicit, Form, Lookup, Outer, Windows
from tengrad_triton.plan import Geometry

Uses = Sequence[Sequence[Form]]
"""What each micro-batch of a step contributes to one parameter: a list a micro-batch, an entry a use within it."""


def geometry_of(outer: Outer) -> Geometry:
    """Return the sizes that the choice of a representation looks at."""
    n, groups, positions, outputs = outer.g_NGPO.shape
    a, itemsize = outer.a, outer.g_NGPO.itemsize
    if isinstance(a, Windows):
        slides = a.sliding
        sizes = f"{a.kernel_size} stride {slides.stride} padding {slides.padding} dilation {slides.dilation}"
        layout = f"conv {sizes} of {list(a.x_NCHW.shape[2:])}"
        inputs, stored = a.inputs, a.x_NCHW.nbytes
    else:
        layout, inputs, stored = "dense", a.shape[-1], a.nbytes
    return Geometry(n, groups, positions, inputs, outputs, itemsize, stored + outer.g_NGPO.nbytes, layout)


def geometry_of_uses(batch: Sequence[Form]) -> Geometry | None:
    """Return the sizes of one micro-batch's uses; None where they are explicit rows, which leave no choice."""
    if any(isinstance(use, Explicit) for use in batch):
        return None
    outers = [geometry_of(use) for use in batch if isinstance(use, Outer)]
    tables = [use for use in batch if isinstance(use, Lookup)]
    if not tables:
        return outers[0]
    n, _, entries = tables[0].g_NPD.shape
    positions = sum(use.ids_NP.shape[1] for use in tables)
    stored = sum(use.ids_NP.nbytes + use.g_NPD.nbytes for use in tables) + sum(outer.factored_bytes for outer in outers)
    return Geometry(n, 1, positions, entries, tables[0].rows, tables[0].g_NPD.itemsize, stored, "table")


def rows_in(use: Form) -> int:
    """Return how many samples a use is of."""
    if isinstance(use, Explicit):
        return len(use.j_NK)
    return len(use.ids_NP if isinstance(use, Lookup) else use.g_NGPO)


def taken(use: Form, rows: Tensor) -> Form:
    """Return some of a use's rows."""
    if isinstance(use, Explicit):
        return Explicit(use.j_NK[rows])
    if isinstance(use, Lookup):
        return Lookup(use.ids_NP[rows], use.g_NPD[rows], use.rows)
    a = replace(use.a, x_NCHW=use.a.x_NCHW[rows]) if isinstance(use.a, Windows) else use.a[rows]
    return Outer(a, use.g_NGPO[rows])


def joined(uses: Sequence[Sequence[Outer]]) -> Outer:
    """Return one outer product for all uses: along P within a micro-batch, along N between them (P padded by zeros)."""
    if len(uses) == 1 and len(uses[0]) == 1:
        return uses[0][0]
    if all(len(batch) == 1 for batch in uses) and (windows := _same_windows([batch[0].a for batch in uses])):
        return Outer(windows, torch.cat([batch[0].g_NGPO for batch in uses]))
    unfolded = [[use.a.unfold() if isinstance(use.a, Windows) else use.a for use in batch] for batch in uses]
    a = [torch.cat(batch, dim=2) for batch in unfolded]
    g = [torch.cat([use.g_NGPO for use in batch], dim=2) for batch in uses]
    positions = max(part.shape[2] for part in a)
    return Outer(*(torch.cat([F.pad(t, (0, 0, 0, positions - t.shape[2])) for t in parts]) for parts in (a, g)))


def _same_windows(views: Sequence[Tensor | Windows]) -> Windows | None:
    """Return one view of all samples, where all are the same windows of images of one size."""
    first = views[0]
    if not isinstance(first, Windows) or not all(isinstance(view, Windows) for view in views):
        return None
    alike = {view.x_NCHW.shape[1:] for view in views}  # type: ignore[union-attr]
    return replace(first, x_NCHW=torch.cat([view.x_NCHW for view in views])) if len(alike) == 1 else None  # type: ignore[union-attr]


def joined_lookups(uses: Sequence[Sequence[Lookup]]) -> Lookup:
    """Return one lookup for all uses, as `joined` does."""
    ids = [torch.cat([use.ids_NP for use in batch], 1) for batch in uses]
    g = [torch.cat([use.g_NPD for use in batch], 1) for batch in uses]
    positions = max(part.shape[1] for part in ids)
    padded = [F.pad(part, (0, positions - part.shape[1])) for part in ids]
    return Lookup(
        torch.cat(padded), torch.cat([F.pad(part, (0, 0, 0, positions - part.shape[1])) for part in g]), uses[0][0].rows
    )
