"""Checks of what a user gives to a least-squares loss: residual functions, weights and points.

Dimensions: N points of a term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.misspellings import did_you_mean

_TAKEN = ("self", "closure")  # what torch's own wrappers of `step` call their arguments


def check_residuals(residuals: Any) -> None:
    """Raise unless residuals are a dictionary from names, usable as keywords of ``step``, to functions."""
    example = '{"interior": equation, "boundary": model}'
    if not isinstance(residuals, Mapping):
        raise TypeError(
            "residuals must be a dictionary from the names of terms to functions of their points, such as "
            f"{example}, got {type(residuals).__name__}"
        )
    if not residuals:
        raise ValueError(f"residuals must have at least one term, such as {example}, got {residuals!r}")
    for name, residual in residuals.items():
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name) or name in _TAKEN:
            raise ValueError(
                f"the name of a residual must be usable as a keyword of step, as in step(interior=points), "
                f"got {name!r}: use letters, digits and _, and no word of Python, self or closure"
            )
        if not callable(residual):
            raise TypeError(
                f"the residual {name!r} must be a function of its points, or a module, got {type(residual).__name__}: "
                "write lambda x: …"
            )


def check_weights(weights: Any, names: Iterable[str]) -> None:
    """Raise unless weights are a dictionary from names of terms to positive numbers."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f'weights must be a dictionary from the names of terms to numbers, such as {{"boundary": 10.0}}, got '
            f"{type(weights).__name__}"
        )
    for name, weight in weights.items():
        if name not in names:
            known = ", ".join(names)
            raise ValueError(
                f"weights has {name!r}, which is no residual{did_you_mean(name, names)}; there are {known}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            if isinstance(weight, Tensor) and weight.numel() > 1:
                raise TypeError(
                    f"the weight of {name!r} must be a number, got a tensor {tuple(weight.shape)}: for a weight of "
                    "each point, return its root times the residual"
                )
            raise TypeError(f"the weight of {name!r} must be a number, got {weight!r}: write float(weight)")
        if not 0 < weight < math.inf:
            raise ValueError(
                f"the weight of {name!r} must be positive and finite, got {weight}: leave out a term that has no weight"
            )


def checked_points(name: str, points: Any, device: torch.device) -> tuple[Tensor, ...]:
    """Return the arguments of a residual function, tensors of their own with the entries of those that were given.

    So a function that calls ``requires_grad_()`` changes none of the user's, and points that were computed from the
    model are points, not functions of the parameters.

    Raises:
        TypeError: they are no tensors.
        ValueError: there are none, some are not finite, their numbers differ, or they are on another device.
    """
    tensors = (points,) if isinstance(points, Tensor) else tuple(points) if isinstance(points, (tuple, list)) else ()
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(
            f"the points of {name!r} must be a tensor [N, …], or a tuple of them for several arguments, got "
            f"{_named(points)}: {_conversion(points)}"
        )
    if any(x.dim() == 0 for x in tensors):
        raise ValueError(f"the points of {name!r} must have a first dimension, that of the points, got a 0-dim tensor")
    if any(x.device != device for x in tensors):
        others = ", ".join(dict.fromkeys(str(x.device) for x in tensors if x.device != device))
        raise ValueError(f"the points of {name!r} are on {others}, but the model is on {device}: move them there")
    if any(len(x) != len(tensors[0]) for x in tensors):
        lengths = ", ".join(str(len(x)) for x in tensors)
        raise ValueError(
            f"the tensors of {name!r} must have one first dimension, the number of points, got {lengths}: expand "
            "what all points share"
        )
    if len(tensors[0]) == 0:
        raise ValueError(f"the residual {name!r} has 0 points: give it at least one, or leave the residual out")
    if not all(bool(x.isfinite().all()) for x in tensors):
        raise ValueError(f"the points of {name!r} must be finite, but some are NaN or infinite")
    own = [
        x.clone() if x.is_inference() else x.detach() for x in tensors
    ]  # what inference mode made has no derivatives
    return tuple(x.requires_grad_(given.requires_grad) for x, given in zip(own, tensors, strict=True))


def why_it_failed(error: Exception, name: str, points: tuple[Tensor, ...], model: nn.Module) -> Exception | None:
    """Return a TypeError that names the types where points and parameters have different ones; else None."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    others = {x.dtype for x in points if x.is_floating_point() or "dtype" in str(error)} - own
    if not others:
        return None
    return TypeError(
        f"the residual {name!r} failed at points of {_listed(others)} with a model of {_listed(own)}: give both one "
        f"type, such as model.double() and points.double() ({error})"
    )


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


def _conversion(points: Any) -> str:
    """Return how a tensor is made of what was given."""
    parts: list[Callable[..., Any] | Any] = list(points) if isinstance(points, (tuple, list)) else [points]
    if any(hasattr(part, "__array__") for part in parts):
        return "convert an array by torch.from_numpy"
    if points is None or parts == []:
        return "a residual that needs no points takes torch.zeros(1, 1)"
    if isinstance(points, Mapping):
        return "give its tensors as a tuple"
    return "convert numbers by torch.tensor"


def _named(value: Any) -> str:
    """Return a value's type, and those of its parts."""
    if isinstance(value, (tuple, list)) and value:
        return f"a {type(value).__name__} of {', '.join(dict.fromkeys(type(part).__name__ for part in value))}"
    return f"an empty {type(value).__name__}" if isinstance(value, (tuple, list)) else repr(type(value).__name__)
