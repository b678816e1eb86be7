"""The per-sample gradients J of one parameter, stored so that gram, project and expand are cheap.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from tengrad_triton.layers import Outer, Windows, matrix_view
from tengrad_triton.plan import FACTOR_KERNELS, ROW_KERNELS, WINDOW_KERNELS, Kernels, Product, Representation
from tengrad_triton.products import Team, servers
from tengrad_triton.update import Target
from tengrad_triton.uses import geometry_of, joined, taken

CHUNK_BYTES = 256 * 2**20  # explicit per-sample gradients formed at a time where they are not kept

RowKind = Literal["samples", "directions", "parameters"]
"""What a row of explicit J belongs to."""


class Jacobian(Protocol):
    """Rows J_n of one parameter, N of them.

    A class whose products are taken for many parameters in one launch is a `Team` as well.
    """

    @property
    def rows(self) -> int:
        """Return N."""

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


BlockJacobian = Mapping[str, Jacobian]
"""A block's J, side by side: the parameters' names within their layer, and the rows of each."""
Jacobians = Mapping[str, BlockJacobian]
"""The J of every block, by the block's name."""


@dataclass(frozen=True)
class PerSample(Team):
    """J itself, a row of K numbers a sample: every product is one pass over memory.

    In bfloat16 the rounded rows are J in every product, so that the step is exact for a slightly different Fisher.
    Instead of a sample a row can be one of a block's leading directions, or of as many rows as there are parameters,
    with the same Jᵀ J (see `woodbury.compress` and `woodbury.curvature`).
    """

    j_NK: Tensor
    ops: Any
    form: RowKind = "samples"

    @property
    def rows(self) -> int:  # noqa: D102
        return len(self.j_NK)

    def team(self, product: Product) -> Hashable:  # noqa: D102
        return PerSample, self.j_NK.dtype, servers(self.ops, self.kernels[product])

    @property
    def kernels(self) -> Kernels:  # noqa: D102
        return ROW_KERNELS

    @staticmethod
    def gram_all(members: Sequence[PerSample], systems: list[int], count: int) -> Tensor:  # noqa: D102
        return members[0].ops.gram_rows([one.j_NK for one in members], systems, count)

    @staticmethod
    def project_all(  # noqa: D102
        members: Sequence[PerSample], v: Sequence[Tensor], systems: list[int], shape: list[int]
    ) -> Tensor:
        rows = [one.j_NK for one in members]
        return members[0].ops.project_rows(rows, [matrix_view(x) for x in v], systems, shape)

    @staticmethod
    def expand_update_all_(  # noqa: D102
        members: Sequence[PerSample], targets: Sequence[Target], w: Sequence[Tensor], divisors: Sequence[Tensor]
    ) -> None:
        rows = [one.j_NK for one in members]
        short = [w_N if len(w_N) == len(j_NK) else w_N[: len(j_NK)] for w_N, j_NK in zip(w, rows, strict=True)]
        state, settings = _views(targets), [target.settings for target in targets]
        members[0].ops.expand_rows_update_(*state, rows, short, list(divisors), settings, targets[0].nesterov)

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
class Factored(Team):
    """What the layer saw, a, and the derivatives of its output, g: J_n = Σ_p g_np a_npᵀ is never kept."""

    outer: Outer
    ops: Any

    def _a_NGPI(self) -> Tensor:
        a = self.outer.a
        return a.unfold() if isinstance(a, Windows) else a

    @property
    def rows(self) -> int:  # noqa: D102
        return len(self.outer.g_NGPO)

    def team(self, product: Product) -> Hashable:  # noqa: D102
        return type(self.outer.a), self.outer.g_NGPO.dtype, servers(self.ops, self.kernels[product])

    @property
    def kernels(self) -> Kernels:  # noqa: D102
        return WINDOW_KERNELS if isinstance(self.outer.a, Windows) else FACTOR_KERNELS

    @staticmethod
    def gram_all(members: Sequence[Factored], systems: list[int], count: int) -> Tensor:
        """Return k_LNN by each member's cheaper way: pairs of positions, or J_n of some outputs at a time."""
        ops, k_LNN = members[0].ops, []
        by_rows = [geometry_of(one.outer).prefers_rows for one in members]
        pairs = [t for t, rows in enumerate(by_rows) if not rows]
        if pairs:
            a, g = [members[t]._a_NGPI() for t in pairs], [members[t].outer.g_NGPO for t in pairs]
            k_LNN.append(ops.gram(a, g, [systems[t] for t in pairs], count))
        for one, system in (
            pair for pair, rows in zip(zip(members, systems, strict=True), by_rows, strict=True) if rows
        ):
            k_LNN += [ops.gram_rows([part.sample_grads(ops)], [system], count) for part in one._parts()]
        return sum(k_LNN[1:], start=k_LNN[0])

    @staticmethod
    def project_all(  # noqa: D102
        members: Sequence[Factored], v: Sequence[Tensor], systems: list[int], shape: list[int]
    ) -> Tensor:
        if isinstance(members[0].outer.a, Windows):
            x, g, sizes = _convolutions(members)
            return members[0].ops.project_conv(x, g, _weights(members, v), sizes, systems, shape)
        a, g = [one.outer.a for one in members], [one.outer.g_NGPO for one in members]
        return members[0].ops.project(a, g, [matrix_view(x) for x in v], systems, shape)

    @staticmethod
    def expand_update_all_(  # noqa: D102
        members: Sequence[Factored], targets: Sequence[Target], w: Sequence[Tensor], divisors: Sequence[Tensor]
    ) -> None:
        numbers = list(w), list(divisors), [target.settings for target in targets], targets[0].nesterov
        if isinstance(members[0].outer.a, Windows):
            x, g, sizes = _convolutions(members)
            state = [_weights(members, tensors) for tensors in _state(targets)]
            members[0].ops.expand_conv_update_(*state, x, g, sizes, *numbers)
            return
        a, g = [one.outer.a for one in members], [one.outer.g_NGPO for one in members]
        members[0].ops.expand_update_(*_views(targets), a, g, *numbers)

    def combined(self, directions_RN: Tensor) -> PerSample:  # noqa: D102
        groups, inputs, rows = self.outer.g_NGPO.shape[1], geometry_of(self.outer).inputs, len(directions_RN)
        parts = [
            (directions_RN @ part.sample_grads(self.ops)).view(rows, groups, part.outputs, inputs)
            for part in self._parts()
        ]
        return PerSample(torch.cat(parts, 2).flatten(1), self.ops, "directions")

    def _parts(self) -> list[Outer]:
        """Return the layer in parts of its outputs, whose explicit rows take little memory."""
        chunks = -(-geometry_of(self.outer).per_sample_bytes // CHUNK_BYTES)
        return [Outer(self.outer.a, g) for g in self.outer.g_NGPO.chunk(chunks, dim=3)]

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


def _state(targets: Sequence[Target]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*((target.parameter, target.momentum, target.grad) for target in targets), strict=True)


def _views(targets: Sequence[Target]) -> list[list[Tensor]]:
    return [[matrix_view(x) for x in kind] for kind in _state(targets)]


def _convolutions(members: Sequence[Factored]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Return inputs, derivatives [N, O, H, W], and all `ConvGeometry.numbers`."""
    views = [cast("Windows", one.outer.a) for one in members]
    g = [one.outer.g_NOHW(view) for one, view in zip(members, views, strict=True)]
    return [view.x_NCHW for view in views], g, [number for view in views for number in view.sliding.numbers]


def _weights(members: Sequence[Factored], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return parameter-shaped tensors as weights of convolutions in a plane."""
    sizes = [cast("Windows", one.outer.a).kernel_size for one in members]
    return [x.view(*x.shape[:2], *size) for x, size in zip(tensors, sizes, strict=True)]
