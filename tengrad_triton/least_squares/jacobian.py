"""J̃ of one step: its rows, all of them or some points' at a time, and the memory that they take.

Dimensions: N points of a term, M residuals at each, R residuals of all terms, K entries of the trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.least_squares.evaluations import flatten, write_
from tengrad_triton.least_squares.many_rows import Chunks, Sketched, Streamed, Subset
from tengrad_triton.least_squares.settings import Settings, columns_of
from tengrad_triton.least_squares.systems import Block, Blocks, System
from tengrad_triton.residuals.rows import RowFinder
from tengrad_triton.residuals.surroundings import Surroundings
from tengrad_triton.residuals.terms import Points, Term, Terms

_CHUNKS = 8  # a chunk takes at most this part of max_bytes


class JacobianFinder:
    """Finds J̃ at the model's present parameters, in the form that the settings and the memory allow.

    Args:
        terms: of the loss.
        rows: finds the rows of a batch of points.
        settings: of the optimizer.
        ops: the kernels.
        generator: draws which points have rows, and sketches.
    """

    def __init__(self, terms: Terms, rows: RowFinder, settings: Settings, ops: Ops, generator: torch.Generator) -> None:
        self._terms, self._rows, self._settings = terms, rows, settings
        self._ops, self._generator = ops, generator
        self._held: Tensor | None = None  # J̃ of the last step; a new one would be fetched from the system page by page
        self._trained: list[int] = []  # the parameters whose blocks were found
        self._columns: Sequence[Tensor] | None = None

    def system(self, parameters: Sequence[Tensor], points: Points) -> tuple[Tensor, System]:
        """Return r̃ [R] and the system of one step.

        Args:
            parameters: the trained ones.
            points: of each term.

        Raises:
            ValueError: the system does not fit into ``max_bytes``.
        """
        chosen = self._drawn(points)
        counts = self._terms.counts(chosen)
        entry, k, r = parameters[0].element_size(), sum(p.numel() for p in parameters), sum(counts.values())
        if self._is_streamed(entry, r, k):
            size = max(1, self._settings.max_bytes // _CHUNKS // (entry * k))
            return self._streamed(parameters, points, self._chunks(parameters, points, counts, size))
        before = Surroundings.now(self._terms.model)
        r_R, j_RK = self._stored(parameters, chosen, counts)
        if self._settings.max_rows is not None:
            before.restore()
            whole_R, gradient_K = self._gradient(parameters, points)
            return whole_R, Subset(j_RK, gradient_K, self._ops)
        if self._settings.sketch is not None:
            return r_R, Sketched(j_RK, min(self._settings.sketch, r), self._generator, self._ops)
        columns = self._columns_of(parameters)
        return r_R, Block(j_RK, self._ops) if columns is None else Blocks(j_RK, columns, self._ops)

    def _columns_of(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Return the columns of each block, None for one block of all; found again when parameters were frozen."""
        if self._trained != (now := list(map(id, parameters))):
            self._trained = now
            self._columns = columns_of(self._terms.model, self._settings.blocks, parameters)
        return self._columns

    def _is_streamed(self, entry: int, r: int, k: int) -> bool:
        """Whether J̃ is too large to be stored, and the matrix of parameters is not.

        Raises:
            ValueError: neither fits.
        """
        least, most = min(r, k), self._settings.max_bytes
        matrices = 2 * entry * (self._settings.sketch or least) ** 2
        if entry * r * k + matrices <= most:
            return False
        plain = self._settings.sketch is None and self._settings.max_rows is None and self._settings.blocks == "network"
        if plain and k <= r and matrices + most // _CHUNKS <= most:
            return True
        gib = (entry * r * k + matrices) / 2**30
        advice = "give fewer points, a larger max_bytes, or max_rows="
        raise ValueError(
            f"{r} residuals and {k} parameters take {gib:.2g} GiB for the rows and the matrix of min({r}, {k})², more "
            f"than max_bytes = {most / 2**30:.2g} GiB: {advice}"
            f"{' (sketch= makes the matrix smaller, not the rows)' if entry * r * k < most else ''}"
        )

    def _streamed(self, parameters: Sequence[Tensor], points: Points, chunks: Chunks) -> tuple[Tensor, System]:
        """Return r̃ and the system of rows that are computed in chunks.

        Raises:
            ValueError: the residuals of chunks are not those of all points together.
        """
        before = Surroundings.now(self._terms.model)
        streamed = Streamed(chunks, self._ops)
        before.restore()
        whole_R = self._terms.values(points)
        self._terms.check_finite(whole_R, points)
        # ‖J̃‖ ‖θ‖ is the size of what residuals near zero are the difference of.
        least = math.sqrt(streamed.trace) * flatten(parameters).norm()
        parts = (self._terms.split(x, points) for x in (streamed.r_R, whole_R))
        for term, part, whole in zip(self._terms.terms, *parts, strict=True):
            if not bool((part - whole).norm() <= torch.finfo(whole.dtype).eps ** 0.5 * (whole.norm() + least)):
                raise self._not_chunked(term)
        return whole_R, streamed

    def _drawn(self, points: Points) -> Points:
        """Return points with at most ``max_rows`` residuals, of each term its share, drawn at random."""
        most = self._settings.max_rows
        counts = self._terms.counts(points)
        total = sum(counts.values())
        if most is None or total <= most:
            return points
        drawn = {}
        for name, tensors in points.items():
            n = len(tensors[0])
            kept = max(1, n * most // total)
            index = torch.randperm(n, generator=self._generator, device=self._generator.device)[:kept]
            drawn[name] = tuple(x[index.to(x.device)] for x in tensors)
        return drawn

    def _stored(self, parameters: Sequence[Tensor], points: Points, counts: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        """Return r̃ and J̃ of points with so many residuals."""
        shape = sum(counts.values()), sum(p.numel() for p in parameters)
        if self._held is None or self._held.shape != shape or self._held.dtype != parameters[0].dtype:
            self._held = parameters[0].new_empty(shape)
        j_RK = self._held
        rs, start = [], 0
        for term in self._terms.terms:
            end = start + counts[term.name]
            scale = term.scale_of(counts[term.name])
            rs.append(self._fill(term, parameters, points[term.name], scale, j_RK[start:end]))
            start = end
        r_R = torch.cat(rs)
        self._terms.check_finite(r_R, points)
        return r_R, j_RK

    def _fill(
        self, term: Term, parameters: Sequence[Tensor], points: tuple[Tensor, ...], scale: float, j_RK: Tensor
    ) -> Tensor:
        """Write a term's rows, times its scale, into ``j_RK``; return its residuals, times its scale.

        Raises:
            ValueError: there are more or fewer residuals than before, or rows are not finite where the residuals are.
        """
        r, rows = self._rows.of_term(term, parameters, points)
        if len(r) != len(j_RK):
            raise ValueError(
                f"the residual {term.name!r} returned {len(r)} residuals for {len(points[0])} points, but "
                f"{len(j_RK)} were expected from the points before: return the same number for each point"
            )
        for part, target in zip(rows, j_RK.split([p.numel() for p in parameters], 1), strict=True):
            torch.mul(part, scale, out=target.view(part.shape))
        # One sum takes a twentieth of the time of asking every entry; where it overflows, every entry is asked.
        if not math.isfinite(j_RK.sum()) and not bool(j_RK.isfinite().all()) and bool(r.isfinite().all()):
            raise ValueError(
                f"the residual {term.name!r} is finite, but its derivatives by the parameters are not: look for a root "
                "or a norm at zero, or for torch.where around a branch that is not finite"
            )
        return scale * r

    def _chunks(self, parameters: Sequence[Tensor], points: Points, counts: Mapping[str, int], size: int) -> Chunks:
        """Return a function that computes r̃ and J̃ of one chunk of points after the other, at the present parameters."""
        start_K = flatten(parameters)

        def chunks() -> Iterator[tuple[Tensor, Tensor]]:
            write_(parameters, start_K)
            for term in self._terms.terms:
                tensors, count = points[term.name], counts[term.name]
                per_point = count // len(tensors[0])
                step = max(1, size // per_point)
                for first in range(0, len(tensors[0]), step):
                    some = tuple(x[first : first + step] for x in tensors)
                    j_RK = start_K.new_empty(len(some[0]) * per_point, len(start_K))
                    yield self._fill(term, parameters, some, term.scale_of(count), j_RK), j_RK
                    self._check_is_chunked(term)

        return chunks

    def _check_is_chunked(self, term: Term) -> None:
        if self._rows.ways[term.name] == "backward":
            raise self._not_chunked(term)

    def _not_chunked(self, term: Term) -> ValueError:
        return ValueError(
            f"the rows of all points exceed max_bytes, and {term.name!r} cannot be computed in chunks, because its "
            "residuals depend on other points or random numbers, or change the model: give fewer points, or a larger "
            "max_bytes"
        )

    def _gradient(self, parameters: Sequence[Tensor], points: Points) -> tuple[Tensor, Tensor]:
        """Return r̃ [R] of all points, and J̃ᵀ r̃ [K] by one backward pass."""
        with torch.enable_grad():
            r_R = self._terms.values(points, with_graph=True)
            self._terms.check_finite(r_R.detach(), points)
            grads = torch.autograd.grad(r_R, list(parameters), r_R.detach(), allow_unused=True, materialize_grads=True)
        return r_R.detach(), flatten(grads)
