"""The terms of a least-squares loss: named residual functions, their weights, and their points at one step.

Dimensions: N points of a term, M residuals at each point, D coordinates, R residuals of all terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from typing_extensions import override

from tengrad_triton.layers.stateless import call_with, places_of
from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.residuals.checks import check_residuals, check_weights, checked_points, why_it_failed
from tengrad_triton.residuals.surroundings import Surroundings

Residual = Callable[..., Tensor]
"""A function of a batch of points that returns their residuals [N] or [N, …]; a closure over the model."""
Points = Mapping[str, tuple[Tensor, ...]]
"""The arguments of each term's residual function, by the term's name; their first dimension is N."""


@dataclass(frozen=True)
class Term:
    """One term w mean(r²) of the loss.

    Attributes:
        name: of the term.
        residual: returns r at a batch of points.
        weight: w > 0.
    """

    name: str
    residual: Residual
    weight: float

    def scale_of(self, count: int) -> float:
        """Return √(w / count), which makes the term the squared norm of its ``count`` residuals."""
        return math.sqrt(self.weight / count)

    def checked(self, r: Any, points: tuple[Tensor, ...]) -> Tensor:
        """Return what the residual function returned if it is a batch of real numbers.

        Raises:
            TypeError: it is no tensor of floating-point numbers.
            ValueError: its first dimension is not that of the points, or it has no entries.
        """
        if not isinstance(r, Tensor) or not r.is_floating_point():
            got = f"{r.dtype} tensor" if isinstance(r, Tensor) else type(r).__name__
            raise TypeError(
                f"the residual {self.name!r} must return a tensor of floating-point numbers, got {got}{_advice(r)}"
            )
        if r.dim() == 0 or len(r) != len(points[0]):
            raise ValueError(
                f"the residual {self.name!r} must return one residual, or one row of residuals, for each of its "
                f"{len(points[0])} points, got shape {tuple(r.shape)}: return r itself, not its mean or its square"
            )
        if r.numel() == 0:
            raise ValueError(
                f"the residual {self.name!r} must return at least one residual for each point, got shape "
                f"{tuple(r.shape)}"
            )
        return r


def _advice(r: Any) -> str:
    """Return how residuals are made of what was returned in their place; nothing if that is not known."""
    if isinstance(r, Tensor) and r.is_complex():
        return "; return real and imaginary parts of a complex residual as two columns"
    if isinstance(r, (tuple, list)):
        return ": torch.cat([…], 1) makes several equations [N, 1] one tensor"
    return ""


# torch.func raises these for operations that it cannot transform.
NOT_BATCHED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)
_WITHOUT_GRAPH = "does not require grad"  # what torch.autograd.grad says under no_grad


class Bound(nn.Module):
    """A residual function as a module, so that the parameters of the model within it can be replaced."""

    def __init__(self, model: nn.Module, residual: Residual) -> None:
        super().__init__()
        self.model = model
        self.residual = (residual,)  # in a tuple, because a module among the attributes would be a second one

    @override
    def forward(self, *points: Tensor) -> Tensor:
        r: Tensor = self.residual[0](*points)
        return r

    def names_of(self, parameters: Sequence[Tensor]) -> list[str]:
        """Return the name of each parameter within this module."""
        name_of = {id(p): name for name, p in self.named_parameters()}
        return [name_of[id(p)] for p in parameters]


class Terms:
    """All terms of a loss.

    Args:
        model: the module whose parameters are trained; the residual functions are closures over it.
        residuals: the residual function of each term, by the term's name.
        weights: w of each term that has another weight than 1.

    Raises:
        TypeError: a residual function is no function, or a weight no number.
        ValueError: there is no residual, or a weight is not positive or belongs to no term.
    """

    def __init__(
        self, model: nn.Module, residuals: Mapping[str, Residual], weights: Mapping[str, float] | None
    ) -> None:
        check_residuals(residuals)
        check_weights({} if weights is None else weights, list(residuals))
        self.model = model
        weight_of = dict.fromkeys(residuals, 1.0) | dict(weights or {})
        self.terms = [Term(name, residual, weight_of[name]) for name, residual in residuals.items()]
        self._per_point: dict[str, int] = {}  # M of each term, once it was evaluated
        self._compiled: dict[str, Residual] = {}
        self.needs_graph: set[str] = set()  # terms whose residual function calls autograd.grad

    def points_of(self, given: Mapping[str, Any]) -> Points:
        """Return the points of each term.

        Raises:
            TypeError: a term is missing or unknown, or its points are no tensors.
            ValueError: there are no points, points that are not finite, or tensors of different lengths.
        """
        names = [term.name for term in self.terms]
        for name in given.keys() - set(names):
            raise TypeError(f"no residual is named {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
        missing = [name for name in names if name not in given]
        if missing:
            example = ", ".join(f"{name}=points" for name in names)
            raise TypeError(
                f"a step needs the points of every residual, {', '.join(missing)} had none: step({example})"
            )
        device = next(self.model.parameters()).device
        return {name: checked_points(name, given[name], device) for name in names}

    def counts(self, points: Points) -> dict[str, int]:
        """Return N M of each term: how many residuals it has at its points."""
        if not self._per_point:
            before = Surroundings.now(self.model)
            self.values(points)
            before.restore()
        return {name: len(tensors[0]) * self._per_point[name] for name, tensors in points.items()}

    def call(self, term: Term, points: tuple[Tensor, ...]) -> Tensor:
        """Return what a term's residual function returns, checked.

        Raises:
            TypeError: it returns no real numbers, or fails at points of another type than the model's.
            ValueError: it returns no batch, or fails at points on another device than the model.
        """
        try:
            compiles = term.name in self._compiled and not torch.is_grad_enabled()
            r = self._compiled[term.name](*points) if compiles else term.residual(*points)
        except RuntimeError as error:
            needs_graph = not torch.is_grad_enabled() and _WITHOUT_GRAPH in str(error)
            why = None if needs_graph else why_it_failed(error, term.name, points, self.model)
            if why is None:
                shapes = ", ".join(str(tuple(x.shape)) for x in points)
                error.add_note(f"in the residual {term.name!r}, at points of shape {shapes}")
                raise
            raise why from error
        return term.checked(r, points)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over, which is compiled anew."""
        return {**vars(self), "_compiled": {}}

    def use_compiled(self, term: Term, residual: Residual | None) -> None:
        """Take a compiled residual function where a term is evaluated without a graph; None is no more of it."""
        self._compiled.pop(term.name, None)
        if residual is not None:
            self._compiled[term.name] = residual

    def is_compiled(self, term: Term) -> bool:
        """Whether `use_compiled` was called for a term."""
        return term.name in self._compiled

    def values(self, points: Points, with_graph: bool = False) -> Tensor:
        """Return all residuals r̃ [R] at the model's present parameters; the loss is ‖r̃‖²."""
        return torch.cat([self.value(term, points[term.name], with_graph) for term in self.terms])

    def value(self, term: Term, points: tuple[Tensor, ...], with_graph: bool = False) -> Tensor:
        """Return one term's residuals times their scale, [N M]."""
        with torch.set_grad_enabled(with_graph or term.name in self.needs_graph):
            try:
                r = self.call(term, points)
            except RuntimeError as error:
                if torch.is_grad_enabled() or _WITHOUT_GRAPH not in str(error):
                    raise
                self.needs_graph.add(term.name)
                return self.value(term, points)
        self._per_point[term.name] = r.numel() // len(r)
        flat = r.flatten() if with_graph else r.detach().flatten()
        return term.scale_of(len(flat)) * flat

    def batched_values(self, points: Points, parameters: Sequence[Tensor], thetas_TK: Tensor) -> Tensor | None:
        """Return r̃ [T, R] at several values of the parameters; None where `torch.func` cannot run them in one batch."""
        if self.needs_graph or next(self.model.buffers(), None) is not None:
            return None
        parts = thetas_TK.split([p.numel() for p in parameters], 1)
        thetas = [part.view(-1, *p.shape) for part, p in zip(parts, parameters, strict=True)]
        found = []
        for term in self.terms:
            bound, arguments = Bound(self.model, term.residual), points[term.name]
            names, places = bound.names_of(parameters), places_of(bound)

            def values(*theta: Tensor) -> Tensor:
                return call_with(bound, places, dict(zip(names, theta, strict=True)), arguments).reshape(-1)  # noqa: B023

            try:
                r_TR = vmap(values)(*thetas)
            except NOT_BATCHED:
                return None
            found.append(term.scale_of(r_TR.shape[1]) * r_TR)
        return torch.cat(found, 1)

    def split(self, r_R: Tensor, points: Points) -> tuple[Tensor, ...]:
        """Return the part of r̃ at the points that each term has."""
        return r_R.split(list(self.counts(points).values()))

    def check_finite(self, r_R: Tensor, points: Points) -> None:
        """Raise ValueError, which names the terms, unless all residuals r̃ at the points are finite."""
        if bool(r_R.isfinite().all()):
            return
        parts = dict(zip(points, self.split(r_R, points), strict=True))
        bad_of = {name: int((~part.isfinite()).sum()) for name, part in parts.items()}
        bad = [f"{name!r}: {bad} of {len(parts[name])}" for name, bad in bad_of.items() if bad]
        raise ValueError(
            f"residuals are NaN or infinite ({', '.join(bad)}): look for a division by zero or a root of a negative "
            "number in them, or for parameters that are not finite"
        )
