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
            ValueError: its first dimension is not that of the points.
        """
        if not isinstance(r, Tensor) or not r.is_floating_point():
            got = f"{r.dtype} tensor" if isinstance(r, Tensor) else type(r).__name__
            raise TypeError(
                f"the residual {self.name!r} must return a tensor of floating-point numbers, got {got}; return real "
                "and imaginary parts of a complex residual as two columns"
            )
        if r.dim() == 0 or len(r) != len(points[0]):
            raise ValueError(
                f"the residual {self.name!r} must return one residual, or one row of residuals, for each of its "
                f"{len(points[0])} points, got shape {tuple(r.shape)}: return r itself, not its mean or its square"
            )
        return r


# torch.func raises these for operations that it cannot transform.
NOT_BATCHED = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


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
        _check_residuals(residuals)
        _check_weights(weights or {}, residuals)
        self.model = model
        weight_of = dict.fromkeys(residuals, 1.0) | dict(weights or {})
        self.terms = [Term(name, residual, weight_of[name]) for name, residual in residuals.items()]
        self._per_point: dict[str, int] = {}  # M of each term, once it was evaluated
        self.needs_graph: set[str] = (
            set()
        )  # terms whose residual function calls autograd.grad, so that it needs a graph

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
        return {name: _checked_points(name, given[name]) for name in names}

    def counts(self, points: Points) -> dict[str, int]:
        """Return N M of each term: how many residuals it has at its points."""
        if not self._per_point:
            self.values(points)
        return {name: len(tensors[0]) * self._per_point[name] for name, tensors in points.items()}

    def values(self, points: Points, with_graph: bool = False) -> Tensor:
        """Return all residuals r̃ [R] at the model's present parameters; the loss is ‖r̃‖²."""
        return torch.cat([self.value(term, points[term.name], with_graph) for term in self.terms])

    def value(self, term: Term, points: tuple[Tensor, ...], with_graph: bool = False) -> Tensor:
        """Return one term's residuals times their scale, [N M]."""
        with torch.set_grad_enabled(with_graph or term.name in self.needs_graph):
            try:
                r = term.residual(*points)
            except RuntimeError as error:
                if torch.is_grad_enabled() or "does not require grad" not in str(error):
                    raise _explained(error, term, points, self.model) from error
                self.needs_graph.add(term.name)
                return self.value(term, points)
        r = term.checked(r, points)
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

    def check_finite(self, r_R: Tensor, points: Points) -> None:
        """Raise ValueError, which names the terms, unless all residuals r̃ at the points are finite."""
        if bool(r_R.isfinite().all()):
            return
        counts = self.counts(points)
        parts = dict(zip(counts, r_R.split(list(counts.values())), strict=True))
        bad_of = {name: int((~part.isfinite()).sum()) for name, part in parts.items()}
        bad = [f"{name!r}: {bad} of {len(parts[name])}" for name, bad in bad_of.items() if bad]
        raise ValueError(
            f"residuals are NaN or infinite ({', '.join(bad)}): look for a division by zero or a root of a negative "
            "number in them, or for parameters that are not finite"
        )


def _explained(error: RuntimeError, term: Term, points: tuple[Tensor, ...], model: nn.Module) -> Exception:
    """Return a TypeError that names the types where points and parameters have different ones, or the error itself."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    others = {x.dtype for x in points if x.is_floating_point()} - own
    if not others:
        return error
    return TypeError(
        f"the residual {term.name!r} failed at points of {' and '.join(map(str, others))} with a model of "
        f"{' and '.join(map(str, own))}: give both one type, such as model.double() and points.double() ({error})"
    )


def _check_residuals(residuals: Any) -> None:
    if not isinstance(residuals, Mapping) or not residuals:
        raise TypeError(
            "residuals must be a dictionary from the names of terms to functions of their points, such as "
            f'{{"interior": equation, "boundary": model}}, got {type(residuals).__name__ if residuals else residuals!r}'
        )
    for name, residual in residuals.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the name of a residual must be usable as a keyword of step, got {name!r}")
        if not callable(residual):
            raise TypeError(f"the residual {name!r} must be a function of its points, got {type(residual).__name__}")


def _check_weights(weights: Mapping[str, Any], residuals: Mapping[str, Residual]) -> None:
    for name, weight in weights.items():
        if name not in residuals:
            raise ValueError(f"weights has {name!r}, which is no residual{did_you_mean(name, residuals)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"the weight of {name!r} must be a number, got {weight!r}")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name!r} must be positive and finite, got {weight}")


def _checked_points(name: str, points: Any) -> tuple[Tensor, ...]:
    tensors = (points,) if isinstance(points, Tensor) else tuple(points) if isinstance(points, (tuple, list)) else ()
    if not tensors or not all(isinstance(x, Tensor) and x.dim() > 0 for x in tensors):
        raise TypeError(f"the points of {name!r} must be a tensor [N, …] or a tuple of them, got {_named(points)}")
    if any(len(x) != len(tensors[0]) for x in tensors):
        lengths = ", ".join(str(len(x)) for x in tensors)
        raise ValueError(f"the tensors of {name!r} must have one first dimension, the number of points, got {lengths}")
    if len(tensors[0]) == 0:
        raise ValueError(f"the residual {name!r} has 0 points: give it at least one, or leave the residual out")
    if not all(bool(x.isfinite().all()) for x in tensors):
        raise ValueError(f"the points of {name!r} must be finite, but some are NaN or infinite")
    return tensors


def _named(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value).__name__)
