"""The per-sample gradients of a table that is looked up, stored as what was looked up and what came back.

Dimensions: N samples, P positions, V rows of the table, D entries of a row, K entries of a flat gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import Representation
from tengrad_triton.curvature.contributions import concat, concat_embedding, take_rows
from tengrad_triton.curvature.jacobian import CHUNK_BYTES, Factored, Jacobian, PerSample
from tengrad_triton.curvature.target import Target, table_update_
from tengrad_triton.layers import EmbeddingGrads, OuterProducts


@dataclass(frozen=True)
class Table:
    """A table V × D that is looked up, and that may be a linear layer's weight besides (tied embedding and head).

    Neither one-hot vectors nor rows for every sample are kept, only ids, derivatives and the weight's factors.
    """

    lookup: EmbeddingGrads
    outer: OuterProducts | None
    ops: Any

    @property
    def rows(self) -> int:  # noqa: D102
        return len(self.lookup.g_NPD)

    def gram(self) -> Tensor:
        """Return k_NN, from explicit rows for some of the table's rows at a time: those that were looked up."""
        lookup, outer = self.lookup, self.outer
        if outer is None and not torch.compiler.is_compiling():
            known, ids_NP = torch.unique(lookup.ids_NP, return_inverse=True)
            lookup = EmbeddingGrads(ids_NP, lookup.g_NPD, len(known))
        n, entries = len(lookup.g_NPD), lookup.g_NPD.shape[2]
        step = max(1, CHUNK_BYTES // (n * entries * lookup.g_NPD.itemsize))
        k_NN = lookup.g_NPD.new_zeros(n, n)
        for first in range(0, lookup.num_embeddings, step):
            end = min(lookup.num_embeddings, first + step)
            rows = _rows_between(lookup, outer, first, end, self.ops)
            k_NN = k_NN + self.ops.gram_rows([rows], [0], 1)[0]
        return k_NN

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        lookup = self.lookup
        y_N = (v[lookup.ids_NP].to(lookup.g_NPD.dtype) * lookup.g_NPD).sum((1, 2))
        return y_N if self.outer is None else y_N + Factored(self.outer, self.ops).project(v)

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:
        """Take the step without what was looked up, and add that: the update is linear in the direction."""
        if self.outer is None:
            # A direction of the table's size would be one more table.
            table_update_(target.parameter, target.momentum, target.grad, divisor, target.settings, target.nesterov)
        else:
            Factored(self.outer, self.ops).expand_update_(target, w_N, divisor)
        lr, momentum = target.settings[:2].unbind()
        change_NPD = self.lookup.g_NPD * (w_N[: len(self.lookup.g_NPD)] / -divisor)[:, None, None]
        change, ids = change_NPD.flatten(0, 1).to(target.parameter.dtype), self.lookup.ids_NP.flatten()
        target.momentum.index_add_(0, ids, change)
        share = lr * (1 + momentum) if target.nesterov else lr
        target.parameter.index_add_(0, ids, change * -share)

    def combined(self, directions_RN: Tensor) -> PerSample:  # noqa: D102
        rows = _rows_between(self.lookup, self.outer, 0, self.lookup.num_embeddings, self.ops)
        return PerSample(directions_RN @ rows, self.ops, "directions")

    def append_history(self, older: Jacobian, rows: int) -> Table | None:  # noqa: D102
        if not isinstance(older, Table) or older.lookup.num_embeddings != self.lookup.num_embeddings:
            return None
        first = torch.arange(rows, device=self.lookup.g_NPD.device)
        lookup = concat_embedding([[self.lookup], [take_rows(older.lookup, first)]])  # type: ignore[list-item]
        if self.outer is None or older.outer is None:
            return Table(lookup, None, self.ops) if self.outer is older.outer else None
        return Table(lookup, concat([[self.outer], [take_rows(older.outer, first)]]), self.ops)  # type: ignore[list-item]

    @property
    def representation(self) -> Representation:  # noqa: D102
        return "factored"

    def pack(self) -> dict[str, Any]:  # noqa: D102
        lookup = {
            "ids_NP": self.lookup.ids_NP,
            "g_NPD": self.lookup.g_NPD,
            "num_embeddings": self.lookup.num_embeddings,
        }
        outer = {} if self.outer is None else Factored(self.outer, self.ops).pack()
        return {**outer, "lookup": lookup, "kernel_overrides": list(self.ops.kernel_overrides)}

    @property
    def nbytes(self) -> int:  # noqa: D102
        own = self.lookup.ids_NP.nbytes + self.lookup.g_NPD.nbytes
        return own if self.outer is None else own + Factored(self.outer, self.ops).nbytes


def _rows_between(lookup: EmbeddingGrads, outer: OuterProducts | None, first: int, end: int, ops: Any) -> Tensor:
    """Return j_NK of a table's rows from ``first`` to before ``end``."""
    rows = lookup.sample_grads_between(first, end).flatten(1)
    return rows if outer is None else rows + OuterProducts(outer.a, outer.g_NGPO[..., first:end]).sample_grads(ops)
