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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.rows.weights import random_weights
from tengrad_triton.residuals.compiling import compiled, compiled_by_layer
from tengrad_triton.residuals.proofs import agree, is_finite
from tengrad_triton.residuals.surroundings import Surroundings
from tengrad_triton.residuals.suspicions import Suspicions, warn_caller
from tengrad_triton.residuals.terms import NOT_BATCHED, Term, Terms
from tengrad_triton.residuals.ways import WAYS, Way


class RowFinder:
    """Finds the rows of all terms; remembers which way serves each.

    Args:
        terms: of the loss.
        compiles: whether `torch.compile` compiles the first two ways, once they are proved, and the evaluations of
            terms that they serve.
    """

    def __init__(self, terms: Terms, compiles: bool = False) -> None:
        self._terms, self._compiles = terms, compiles
        self._untried = {term.name: iter(WAYS) for term in terms.terms}
        self._calls = dict.fromkeys(self._untried, 0)
        self._proven: dict[str, set[int]] = {name: set() for name in self._untried}  # numbers of points
        self._rows: dict[str, Way] = {}
        self.ways: dict[str, str] = {}
        self._suspicions = Suspicions()

    def resume(self, ways: Mapping[str, str]) -> None:
        """Begin anew, where `ways` had come to in another finder for these terms."""
        order = list(WAYS)
        first = {name: order.index(way) for name, way in ways.items() if way in order}
        self._untried = {name: iter(order[first.get(name, 0) :]) for name in self._untried}
        self._calls, self._rows, self.ways = dict.fromkeys(self._untried, 0), {}, {}
        for term in self._terms.terms:
            self._terms.use_compiled(term, None)

    def of_term(
        self, term: Term, parameters: Sequence[Tensor], points: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a term's residuals r [N M] and their rows [N M, *parameter.shape] of each parameter.

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
            try:
                r, rows = self._run(term, parameters, points, before)
            except torch.OutOfMemoryError:
                raise
            except NOT_BATCHED:
                before.restore()
                expected = expected or self._expected(term, parameters, points)  # raises what the function itself does
                if self.ways[term.name] == "backward":
                    raise
                self._rows.pop(term.name)
                continue
            if self.ways[term.name] == "backward" or expected is None or agree(r, rows, expected, parameters):
                if expected is not None:
                    r = expected[0]
                    self._note_proof(term, expected, before)
                return r.flatten(), [j.reshape(r.numel(), *p.shape) for j, p in zip(rows, parameters, strict=True)]
            self._rows.pop(term.name)

    def _run(
        self, term: Term, parameters: Sequence[Tensor], points: tuple[Tensor, ...], before: Surroundings
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what a term's way finds; it is compiled no more if it draws random numbers or changes buffers now.

        So it does after ``model.train()``, where the model has dropout.
        """
        before.restore()
        found = self._rows[term.name](parameters, points)
        if not self._terms.is_compiled(term) or not before.are_left():
            return found
        self._terms.use_compiled(term, None)
        self._rows[term.name] = self._uncompiled(term)
        before.restore()
        return self._rows[term.name](parameters, points)

    def _is_proof_due(self, term: Term, count: int) -> bool:
        """Whether the rows of a call with ``count`` points are compared with autograd's."""
        if term.name not in self._rows:
            return True
        calls = self._calls[term.name]
        due = calls & (calls - 1) == 0 or count not in self._proven[term.name]  # 1, 2, 4, 8, …
        return due and self.ways[term.name] != "backward"

    def _note_proof(self, term: Term, expected: tuple[Tensor, list[Tensor]], before: Surroundings) -> None:
        """Note that rows were compared, unless that says nothing of them.

        A compiled function draws other random numbers: what draws some, or changes buffers, is not compiled.
        """
        if not is_finite(*expected):
            self._calls[term.name] = 0
            return
        self._proven[term.name].add(len(expected[0]))
        if self._compiles and not self._terms.is_compiled(term) and not before.are_left():
            self._compile(term)

    def _compile(self, term: Term) -> None:
        """Compile a term's evaluations and its way, where it is one of the first two, from the next call on."""
        if self.ways[term.name] == "by layer":
            self._rows[term.name] = compiled_by_layer(term.residual, term.name)
        elif self.ways[term.name] == "batched":
            self._rows[term.name] = compiled(self._rows[term.name], term.name)
        else:
            return
        self._terms.use_compiled(term, compiled(term.residual, term.name))

    def _take_next_way(self, term: Term) -> None:
        way = next(self._untried[term.name])
        self.ways[term.name], self._proven[term.name] = way, set()
        self._rows[term.name] = self._uncompiled(term)
        if way in ("expanded", "backward"):
            self._terms.needs_graph.add(term.name)
        if way == "backward":
            warn_caller(
                f"the rows of {term.name!r} take one backward pass for each residual, exact but slow: write it "
                "with tengrad_triton.derivatives or torch.func, without random numbers, in-place changes of the model, "
                "or values of other points"
            )

    def _uncompiled(self, term: Term) -> Way:
        return WAYS[self.ways[term.name]](self._terms.model, term.residual)

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
