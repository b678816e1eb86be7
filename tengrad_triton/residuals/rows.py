"""The rows of J̃: the gradient of every residual of every term, by the cheapest way that autograd confirms.

There are five ways, each slower or more general than the one before:

1. ``by layer``: one backward pass for all points, where weights are used in linear layers only (`by_layer`), also
   within `tengrad_triton.jets`;
2. ``batched``: `torch.func` computes the residual of single points, all points in one pass. That holds for residuals
   whose derivatives are `tengrad_triton.jets` or `torch.func`, and for those without any;
3. ``captured``: the same, where the residual function holds parameters itself, such as the unknown coefficient of an
   equation, which replacing those of the model's modules does not reach;
4. ``expanded``: one backward pass with a copy of the weights for each point (`expanded`), where the residual function
   calls `torch.autograd.grad`;
5. ``backward``: one backward pass for each residual, which is exact for any function.

The first four are exact only if no residual depends on other points. So their residuals and the sum of their rows,
each times a random number, are compared with those of the whole batch when a term is new or has another number of
points than before, and later at every step whose number is a power of two. If they differ, the next way is taken.

Dimensions: N points of a term, M residuals at each point, K entries of all trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from typing_extensions import override

from tengrad_triton.capture.rows.rerun import batched_grads, ignore_vmap_warning
from tengrad_triton.capture.rows.weights import random_weights
from tengrad_triton.layers.stateless import call_with, places_of
from tengrad_triton.residuals.by_layer import rows_by_layer
from tengrad_triton.residuals.compiling import compiled
from tengrad_triton.residuals.expanded import residuals_and_rows
from tengrad_triton.residuals.surroundings import Surroundings
from tengrad_triton.residuals.suspicions import Suspicions, warn_caller
from tengrad_triton.residuals.terms import NOT_BATCHED, Bound, Residual, Term, Terms

_CHUNK_BYTES = 256 * 2**20  # one pass computes rows of at most this size
_RESIDUALS_PER_PASS = 16  # backward passes of this many residuals are batched into one

Way = Callable[[Sequence[Tensor], tuple[Tensor, ...]], tuple[Tensor, list[Tensor]]]
"""From the trained parameters and a term's points to its residuals [N, …] and the rows [N, …, *parameter.shape]."""


class _Captured(TorchFunctionMode):
    """Gives operations other tensors in the place of parameters, by the parameters' ids."""

    def __init__(self, tensor_of: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensor_of = tensor_of

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: self._tensor_of.get(id(x), x), (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def captured(model: nn.Module, residual: Residual) -> Way:
    """Return the way of `batched` that reaches the parameters that the residual function holds itself."""

    def context(parameters: Sequence[Tensor], tensors: Iterable[Tensor]) -> _Captured:
        return _Captured(dict(zip(map(id, parameters), tensors, strict=True)))

    return batched(model, residual, context)


def batched(
    model: nn.Module,
    residual: Residual,
    context: Callable[[Sequence[Tensor], Iterable[Tensor]], AbstractContextManager[Any]] = lambda *_: nullcontext(),
) -> Way:
    """Return the way that transforms the residual function of single points by `torch.func`."""
    bound = Bound(model, residual)

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        places = places_of(bound)
        names = bound.names_of(parameters)
        row_bytes = sum(p.numel() * p.element_size() for p in parameters)

        def of_point(*point: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            def forward(replaced: dict[str, Tensor]) -> Tensor:
                with context(parameters, replaced.values()):
                    return call_with(bound, places, replaced, tuple(x[None] for x in point))[0]

            transformed: Any = vjp(forward, dict(zip(names, (p.detach() for p in parameters), strict=True)))
            r, pull = transformed
            if r.numel() == 1:
                return r, pull(torch.ones_like(r))[0]
            eye = torch.eye(r.numel(), dtype=r.dtype, device=r.device).view(-1, *r.shape)
            return r, {name: g.view(*r.shape, *g.shape[1:]) for name, g in vmap(pull)(eye)[0].items()}

        chunk = max(1, _CHUNK_BYTES // row_bytes)
        with ignore_vmap_warning(), torch.no_grad():
            found = vmap(of_point, chunk_size=chunk if len(points[0]) > chunk else None)(*(x.detach() for x in points))
        return found[0], [found[1][name] for name in names]

    return rows


def by_layer(model: nn.Module, residual: Residual) -> Way:
    """Return the way by the inputs and output gradients of linear layers."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        return rows_by_layer(residual, parameters, points)

    return rows


def expanded(model: nn.Module, residual: Residual) -> Way:
    """Return the way of one backward pass with a copy of the weights for each point."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            return residuals_and_rows(model, residual, points, check=False)

    return rows


def backward(model: nn.Module, residual: Residual) -> Way:
    """Return the way of one backward pass for each residual, which is exact for any function."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            r = residual(*points)
            flat = r.reshape(-1)
        parts: list[list[Tensor]] = [[] for _ in parameters]
        for first in range(0, len(flat), _RESIDUALS_PER_PASS):
            last = min(len(flat), first + _RESIDUALS_PER_PASS)
            cotangents = torch.zeros(last - first, len(flat), dtype=r.dtype, device=r.device)
            cotangents[torch.arange(last - first), torch.arange(first, last)] = 1
            for grads in batched_grads([flat], list(parameters), [cotangents]):
                for part, p, grad in zip(parts, parameters, grads, strict=True):
                    part.append(torch.zeros_like(p) if grad is None else grad)
        return r.detach(), [torch.stack(part).view(*r.shape, *part[0].shape) for part in parts]

    return rows


WAYS: dict[str, Callable[[nn.Module, Residual], Way]] = {
    "by layer": by_layer,
    "batched": batched,
    "captured": captured,
    "expanded": expanded,
    "backward": backward,
}


class RowFinder:
    """Finds the rows of all terms; remembers which way serves each.

    Args:
        terms: of the loss.
        compiles: whether `torch.compile` compiles the batched way, which then comes first, and the evaluations of terms
            that it serves.
    """

    def __init__(self, terms: Terms, compiles: bool = False) -> None:
        self._terms, self._compiles = terms, compiles
        self._order = [way for way in WAYS if not (compiles and way == "by layer")]
        self._untried = {term.name: iter(self._order) for term in terms.terms}
        self._calls = dict.fromkeys(self._untried, 0)
        self._proven: dict[str, set[int]] = {name: set() for name in self._untried}  # numbers of points
        self._rows: dict[str, Way] = {}
        self.ways: dict[str, str] = {}
        self._suspicions = Suspicions()

    def resume(self, ways: Mapping[str, str]) -> None:
        """Begin anew, where `ways` had come to in another finder for these terms."""
        first = {name: self._order.index(way) for name, way in ways.items() if way in self._order}
        self._untried = {name: iter(self._order[first.get(name, 0) :]) for name in self._untried}
        self._calls, self._rows, self.ways = dict.fromkeys(self._untried, 0), {}, {}

    def of_term(
        self, term: Term, parameters: Sequence[Tensor], points: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a term's residuals r [N M] and their rows [N M, k] of each parameter of k entries.

        Random numbers and buffers are then those after one evaluation, however many there were.

        Raises:
            ValueError: the residual does not depend on the parameters, or returned no batch.
        """
        self._calls[term.name] += 1
        before = Surroundings.now(self._terms.model)
        expected = self._expected(term, parameters, points) if self._is_proof_due(term, len(points[0])) else None
        while True:
            if term.name not in self._rows:
                self._take_next_way(term)
            before.restore()
            try:
                r, rows = self._rows[term.name](parameters, points)
            except torch.OutOfMemoryError:
                raise
            except NOT_BATCHED:
                before.restore()
                expected = expected or self._expected(term, parameters, points)  # raises what the function itself does
                if self.ways[term.name] == "backward":
                    raise
                self._rows.pop(term.name)
                continue
            if self.ways[term.name] == "backward" or expected is None or _agree(r, rows, expected, parameters):
                flat = r.flatten() if expected is None else self._proved(term, expected).flatten()
                return flat, [j.reshape(len(flat), -1) for j in rows]
            self._rows.pop(term.name)

    def _is_proof_due(self, term: Term, count: int) -> bool:
        """Whether the rows of a call with ``count`` points are compared with autograd's."""
        if term.name not in self._rows:
            return True
        calls = self._calls[term.name]
        due = calls & (calls - 1) == 0 or count not in self._proven[term.name]  # 1, 2, 4, 8, …
        return due and self.ways[term.name] != "backward"

    def _proved(self, term: Term, expected: tuple[Tensor, list[Tensor]]) -> Tensor:
        """Note that rows were compared, unless that says nothing of them; return the residuals."""
        if _is_finite(*expected):
            self._proven[term.name].add(len(expected[0]))
            if self._compiles and self.ways[term.name] == "batched" and not self._terms.is_compiled(term):
                self._terms.compile(term)
                self._rows[term.name] = compiled(self._rows[term.name], term.name)
        else:
            self._calls[term.name] = 0
        return expected[0]

    def _take_next_way(self, term: Term) -> None:
        way = next(self._untried[term.name])
        self.ways[term.name], self._proven[term.name] = way, set()
        rows = WAYS[way](self._terms.model, term.residual)
        self._rows[term.name] = rows
        if way in ("expanded", "backward"):
            self._terms.needs_graph.add(term.name)
        if way == "backward":
            warn_caller(
                f"the rows of {term.name!r} take one backward pass for each residual, exact but slow: write it "
                "with tengrad_triton.derivatives or torch.func, without random numbers, in-place changes of the model, "
                "or values of other points"
            )

    def _expected(
        self, term: Term, parameters: Sequence[Tensor], points: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the residuals of the whole batch, and the gradient of their sum with random weights.

        Raises:
            ValueError: no residual depends on a parameter.
        """
        with torch.enable_grad():
            r = self._terms.call(term, points)
        grads: Sequence[Any] = [None]
        if r.requires_grad:
            weights = random_weights(r.numel(), r).view_as(r)
            grads = torch.autograd.grad(r, list(parameters), weights, allow_unused=True)
        if all(grad is None for grad in grads):
            raise ValueError(
                f"the residual {term.name!r} does not depend on the trained parameters of the model: compute it from "
                "the model that was given to the optimizer, not from a copy of it, without detach() or "
                "torch.no_grad(); torch.autograd.grad needs create_graph=True"
            )
        self._suspicions.look(term.name, r, parameters, points)
        return r.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _is_finite(r: Tensor, grads: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in (r, *grads))


def _agree(
    r: Tensor, rows: Sequence[Tensor], expected: tuple[Tensor, list[Tensor]], parameters: Sequence[Tensor]
) -> bool:
    """Whether residuals and rows are those of the whole batch, within sqrt(eps).

    A residual that is nearly zero is the difference of large numbers, whose rounding errors are not small beside it.
    ‖J‖ ‖θ‖ has the size of those numbers. So are the rows of a parameter on which the residual does not depend because
    parts of it cancel: their rounding errors are those of other rows.
    """
    whole, grads = expected
    if whole.shape != r.shape:
        return False
    if not _is_finite(whole, grads):
        return True  # what is not finite is refused later
    eps = torch.finfo(r.dtype).eps
    size = whole.norm() + sum(j.norm() * p.norm() for j, p in zip(rows, parameters, strict=True))
    if not bool((r - whole).norm() <= eps**0.5 * size):
        return False
    weights = random_weights(r.numel(), r)[:, None]
    weighted = [j.reshape(len(weights), -1) * weights for j in rows]
    sizes = torch.stack([j.norm(dim=1).sum() for j in weighted])
    offs = torch.stack([(j.sum(0) - grad.flatten()).norm() for j, grad in zip(weighted, grads, strict=True)])
    return bool((offs <= eps**0.5 * sizes + eps**0.75 * sizes.sum()).all())
