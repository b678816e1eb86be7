"""The per-sample gradients J of one parameter, stored so that gram, project and expand are cheap.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tengrad_triton.backend import KernelsFor
from tengrad_triton.layers import Explicit, Form, Lookup, Outer, Windows, canonical_rows, matrix_view
from tengrad_triton.plan import Representation
from tengrad_triton.update import Target, table_update_
from tengrad_triton.uses import Uses, geometry_of, joined, joined_lookups, taken

_CHUNK_BYTES = 256 * 2**20  # explicit per-sample gradients formed at a time where they are not kept

RowKind = Literal["samples", "directions", "parameters"]
"""What a row of explicit J belongs to."""


class Jacobian(Protocol):
    """Rows J_n of one parameter, N of them."""

    @property
    def ops(self) -> Any:
        """Return the kernels that do the work (see `backend.kernels_of`)."""

    def gram(self) -> Tensor:
        """Return k_NN with K[n, m] = ⟨J_n, J_m⟩."""

    def project(self, v: Tensor) -> Tensor:
        """Return y_N with y_n = ⟨J_n, v⟩ for a parameter-shaped ``v``."""

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:
        """Step the target's parameter in place along (grad − Σ_n w_n J_n) / divisor, by the update rule."""

    def combined(self, directions_RN: Tensor) -> PerSample:
        """Return R combinations of the rows, as rows."""

    def extended(self, older: Jacobian, rows: int) -> Jacobian | None:
        """Return these rows, and behind them the first ones of ``older``; None where the two cannot be joined."""

    @property
    def representation(self) -> Representation:
        """Return the name of this representation."""

    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which `unpack` makes the same object."""

    @property
    def nbytes(self) -> int:
        """Return the bytes stored."""


@dataclass(frozen=True)
class PerSample:
    """J itself, a row of K numbers a sample: every product is one pass over memory.

    In bfloat16 the rounded rows are J in every product, so that the step is exact for a slightly different Fisher.
    Instead of a sample a row can be one of a block's leading directions, or of as many rows as there are parameters,
    with the same Jᵀ J (see `woodbury.compress` and `woodbury.curvature`).
    """

    j_NK: Tensor
    ops: Any
    form: RowKind = "samples"

    def gram(self) -> Tensor:  # noqa: D102
        return self.ops.gram_rows(self.j_NK)

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        wide = torch.promote_types(self.j_NK.dtype, torch.float32)
        return self.ops.project_rows(self.j_NK, matrix_view(v).reshape(-1).to(wide))

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:  # noqa: D102
        w_R = w_N[: len(self.j_NK)]
        self.ops.expand_rows_update_(*_views(target), self.j_NK, w_R, divisor, target.settings, target.nesterov)

    def combined(self, directions_RN: Tensor) -> PerSample:  # noqa: D102
        return PerSample(directions_RN @ self.j_NK, self.ops, "directions")

    def extended(self, older: Jacobian, rows: int) -> PerSample | None:  # noqa: D102
        if not isinstance(older, PerSample) or older.j_NK.dtype != self.j_NK.dtype:
            return None
        return PerSample(torch.cat([self.j_NK, older.j_NK[:rows]]), self.ops)

    @property
    def representation(self) -> Representation:  # noqa: D102
        if self.form == "directions":
            return "compressed"
        return "per_sample_bf16" if self.j_NK.dtype == torch.bfloat16 else "per_sample"

    def pack(self) -> dict[str, Any]:  # noqa: D102
        return {"j_NK": self.j_NK, "torch_for": list(self.ops.torch_for), "form": self.form}

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.j_NK.nbytes


@dataclass(frozen=True)
class Factored:
    """What the layer saw, a, and the derivatives of its output, g: J_n = Σ_p g_np a_npᵀ is never kept."""

    outer: Outer
    ops: Any

    def _a_NGPI(self) -> Tensor:
        a = self.outer.a
        return a.unfold() if isinstance(a, Windows) else a

    def gram(self) -> Tensor:
        """Return k_NN by the cheaper way: from pairs of positions, or from J_n of some outputs at a time."""
        if not geometry_of(self.outer).prefers_rows:
            return self.ops.gram([self._a_NGPI()], [self.outer.g_NGPO])[0]
        return torch.stack([self.ops.gram_rows(part.sample_grads(self.ops)) for part in self._parts()]).sum(0)

    def combined(self, directions_RN: Tensor) -> PerSample:  # noqa: D102
        groups, rows = self.outer.g_NGPO.shape[1], len(directions_RN)
        parts = [
            (directions_RN @ part.sample_grads(self.ops)).view(rows, groups, part.outputs, -1) for part in self._parts()
        ]
        return PerSample(torch.cat(parts, 2).flatten(1), self.ops, "directions")

    def _parts(self) -> list[Outer]:
        """Return the layer in parts of its outputs, whose explicit rows take little memory."""
        chunks = -(-geometry_of(self.outer).per_sample_bytes // _CHUNK_BYTES)
        return [Outer(self.outer.a, g) for g in self.outer.g_NGPO.chunk(chunks, dim=3)]

    def project(self, v: Tensor) -> Tensor:  # noqa: D102
        g_NGPO = self.outer.g_NGPO
        v_GOI = matrix_view(v).reshape(g_NGPO.shape[1], g_NGPO.shape[3], -1).to(g_NGPO.dtype)
        return self.ops.project(self._a_NGPI(), g_NGPO, v_GOI)

    def expand_update_(self, target: Target, w_N: Tensor, divisor: Tensor) -> None:  # noqa: D102
        factors = (self._a_NGPI(), self.outer.g_NGPO)
        self.ops.expand_update_(*_views(target), *factors, w_N, divisor, target.settings, target.nesterov)

    def extended(self, older: Jacobian, rows: int) -> Factored | None:  # noqa: D102
        mine = self.outer
        if not isinstance(older, Factored) or older.outer.g_NGPO.shape[1:] != mine.g_NGPO.shape[1:]:
            return None
        kept = taken(older.outer, torch.arange(rows, device=mine.g_NGPO.device))
        return Factored(joined([[mine], [kept]]), self.ops)  # type: ignore[list-item]

    @property
    def representation(self) -> Representation:  # noqa: D102
        return "factored"

    def pack(self) -> dict[str, Any]:  # noqa: D102
        a = self.outer.a
        return {
            "a": a.pack() if isinstance(a, Windows) else a,
            "g_NGPO": self.outer.g_NGPO,
            "torch_for": list(self.ops.torch_for),
        }

    @property
    def nbytes(self) -> int:  # noqa: D102
        a = self.outer.a
        return (a.x_NCHW if isinstance(a, Windows) else a).nbytes + self.outer.g_NGPO.nbytes


@dataclass(frozen=True)
class Table:
    """A table V × D that is looked up, and that may be a linear layer's weight besides (tied embedding and head).

    Neither one-hot vectors nor rows for every sample are kept, only ids, derivatives and the weight's factors.
    """

    lookup: Lookup
    outer: Outer | None
    ops: Any

    def gram(self) -> Tensor:
        """Return k_NN, from explicit rows for some of the table's rows at a time: those that were looked up."""
        lookup, outer = self.lookup, self.outer
        if outer is None and not torch.compiler.is_compiling():
            known, ids_NP = torch.unique(lookup.ids_NP, return_inverse=True)
            lookup = Lookup(ids_NP, lookup.g_NPD, len(known))
        n, entries = len(lookup.g_NPD), lookup.g_NPD.shape[2]
        step = max(1, _CHUNK_BYTES // (n * entries * lookup.g_NPD.itemsize))
        k_NN = lookup.g_NPD.new_zeros(n, n)
        for first in range(0, lookup.rows, step):
            end = min(lookup.rows, first + step)
            k_NN = k_NN + self.ops.gram_rows(_rows_between(lookup, outer, first, end, self.ops))
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
        rows = _rows_between(self.lookup, self.outer, 0, self.lookup.rows, self.ops)
        return PerSample(directions_RN @ rows, self.ops, "directions")

    def extended(self, older: Jacobian, rows: int) -> Table | None:  # noqa: D102
        if not isinstance(older, Table) or older.lookup.rows != self.lookup.rows:
            return None
        first = torch.arange(rows, device=self.lookup.g_NPD.device)
        lookup = joined_lookups([[self.lookup], [taken(older.lookup, first)]])  # type: ignore[list-item]
        if self.outer is None or older.outer is None:
            return Table(lookup, None, self.ops) if self.outer is older.outer else None
        return Table(lookup, joined([[self.outer], [taken(older.outer, first)]]), self.ops)  # type: ignore[list-item]

    @property
    def representation(self) -> Representation:  # noqa: D102
        return "factored"

    def pack(self) -> dict[str, Any]:  # noqa: D102
        lookup = {"ids_NP": self.lookup.ids_NP, "g_NPD": self.lookup.g_NPD, "rows": self.lookup.rows}
        outer = {} if self.outer is None else Factored(self.outer, self.ops).pack()
        return {**outer, "lookup": lookup, "torch_for": list(self.ops.torch_for)}

    @property
    def nbytes(self) -> int:  # noqa: D102
        own = self.lookup.ids_NP.nbytes + self.lookup.g_NPD.nbytes
        return own if self.outer is None else own + Factored(self.outer, self.ops).nbytes


def _rows_between(lookup: Lookup, outer: Outer | None, first: int, end: int, ops: Any) -> Tensor:
    """Return j_NK of a table's rows from ``first`` to before ``end``."""
    rows = lookup.sample_rows(first, end).flatten(1)
    return rows if outer is None else rows + Outer(outer.a, outer.g_NGPO[..., first:end]).sample_grads(ops)


def _views(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    return matrix_view(target.parameter), matrix_view(target.momentum), matrix_view(target.grad)


def unpack(packed: Mapping[str, Any], like: Tensor, kernels_for: KernelsFor) -> Jacobian:
    """Return what `Jacobian.pack` described, on the device of ``like``."""
    ops = kernels_for(tuple(packed["torch_for"]))

    def move(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) else value

    if "j_NK" in packed:
        return PerSample(move(packed["j_NK"]), ops, packed["form"])
    if "lookup" in packed:
        lookup = Lookup(**{name: move(value) for name, value in packed["lookup"].items()})
        outer = unpack({k: v for k, v in packed.items() if k != "lookup"}, like, kernels_for) if "a" in packed else None
        return Table(lookup, outer.outer if isinstance(outer, Factored) else None, ops)
    a = packed["a"]
    a = Windows(**{name: move(value) for name, value in a.items()}) if isinstance(a, Mapping) else move(a)
    return Factored(Outer(a, move(packed["g_NGPO"])), ops)


def jacobian_of(uses: Uses, representation: Representation, ops: Any) -> Jacobian:
    """Return the rows of one parameter: uses within a micro-batch add up, micro-batches follow each other."""
    kinds = {type(use) for batch in uses for use in batch}
    if Lookup in kinds and Explicit not in kinds and representation == "factored":
        outers = [[use for use in batch if isinstance(use, Outer)] for batch in uses]
        tables = [[use for use in batch if isinstance(use, Lookup)] for batch in uses]
        return Table(joined_lookups(tables), joined(outers) if Outer in kinds else None, ops)
    if kinds == {Outer}:
        few = representation == "compressed" and not geometry_of(uses[0][0]).prefers_rows  # type: ignore[arg-type]
        if representation == "factored" or few:
            return Factored(joined(uses), ops)  # type: ignore[arg-type]
    batches = [_added([_rows(use, ops) for use in batch]) for batch in uses]
    j_NK = batches[0] if len(batches) == 1 else torch.cat(batches)  # torch would copy a single one
    return PerSample(j_NK.bfloat16() if representation == "per_sample_bf16" else j_NK, ops)


def _rows(use: Form, ops: Any) -> Tensor:
    return canonical_rows(use.j_NK) if isinstance(use, Explicit) else use.sample_grads(ops)


def _added(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.stack(tuple(rows)).sum(0)
