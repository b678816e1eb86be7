"""From uses, or from what a checkpoint holds, to the object that stores one parameter's J.

Dimensions: N samples, K entries of a flat gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import OpsFor, Representation
from tengrad_triton.curvature.contributions import Contributions, concat, concat_embedding, geometry_of
from tengrad_triton.curvature.embedding import Table
from tengrad_triton.curvature.jacobian import Factored, Jacobian, PerSample
from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, OuterProducts, PerSampleGrads, canonical_rows


def unpack(packed: Mapping[str, Any], like: Tensor, ops_for: OpsFor) -> Jacobian:
    """Return what `Jacobian.pack` described, on the device of ``like``."""
    ops = ops_for(tuple(packed["kernel_overrides"]))

    def move(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) else value

    if "j_NK" in packed:
        return PerSample(move(packed["j_NK"]), ops, packed["form"])
    if "lookup" in packed:
        lookup = EmbeddingGrads(**{name: move(value) for name, value in packed["lookup"].items()})
        outer = unpack({k: v for k, v in packed.items() if k != "lookup"}, like, ops_for) if "a" in packed else None
        return Table(lookup, outer.outer if isinstance(outer, Factored) else None, ops)
    a = packed["a"]
    a = ConvInput.unpack(**{name: move(value) for name, value in a.items()}) if isinstance(a, Mapping) else move(a)
    return Factored(OuterProducts(a, move(packed["g_NGPO"])), ops)


def jacobian_of(uses: Contributions, representation: Representation, ops: Any) -> Jacobian:
    """Return the rows of one parameter: uses within a micro-batch add up, micro-batches follow each other."""
    kinds = {type(use) for batch in uses for use in batch}
    if EmbeddingGrads in kinds and PerSampleGrads not in kinds and representation == "factored":
        outers = [[use for use in batch if isinstance(use, OuterProducts)] for batch in uses]
        tables = [[use for use in batch if isinstance(use, EmbeddingGrads)] for batch in uses]
        return Table(concat_embedding(tables), concat(outers) if OuterProducts in kinds else None, ops)
    if kinds == {OuterProducts}:
        few = representation == "compressed" and not geometry_of(uses[0][0]).prefers_rows  # type: ignore[arg-type]
        if representation == "factored" or few:
            return Factored(concat(uses), ops)  # type: ignore[arg-type]
    batches = [_added([_rows(use, ops) for use in batch]) for batch in uses]
    j_NK = batches[0] if len(batches) == 1 else torch.cat(batches)  # torch would copy a single one
    return PerSample(j_NK.bfloat16() if representation == "per_sample_bf16" else j_NK, ops)


def _rows(use: Contribution, ops: Any) -> Tensor:
    return canonical_rows(use.j_NK) if isinstance(use, PerSampleGrads) else use.sample_grads(ops)


def _added(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.stack(tuple(rows)).sum(0)
