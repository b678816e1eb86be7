"""What runs, but is seldom meant: residuals of every pair of points, and unknowns that nobody trains.

Dimensions: N points of a term.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NOT_THE_USERS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_MANY = 10  # a system of as many equations as there are points is usual for the few points of an initial condition


def warn_caller(message: str) -> None:
    """Warn at the line outside of this package and of torch that led here."""
    frame, level = sys._getframe(), 1  # what `warnings.warn` counts as level 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Suspicions:
    """Warns of what is seldom meant, once of each term."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()  # kinds and terms

    def look(self, name: str, r: Tensor, parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> None:
        """Warn if a term's residuals r [N, …], with their graph, are suspicious."""
        found = {"pairs": _of_pairs(name, r), "untrained": _of_untrained(name, r, parameters, points)}
        for kind, message in found.items():
            if message and (kind, name) not in self._said:
                self._said.add((kind, name))
                warn_caller(message)


def _of_pairs(name: str, r: Tensor) -> str:
    """Return what to say if residuals are [N, N], as [N, 1] − [N] is by the rules of broadcasting."""
    count = len(r)
    if r.shape != (count, count) or count < _MANY:
        return ""
    return (
        f"the residual {name!r} has {count} parts for each of its {count} points: if these are not so many equations, "
        "it takes tensors [N, 1] and [N] together, which makes one residual of every pair of points; give all of them "
        "one shape"
    )


def _of_untrained(name: str, r: Tensor, parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> str:
    """Return what to say if residuals depend on unknowns that the optimizer was not given.

    Points require a gradient, too, where `torch.autograd.grad` takes derivatives with respect to them. So of other
    tensors than parameters only single numbers count, and these only where no points are a single number.
    """
    trained = {id(p) for p in parameters}
    numbers = all(x.numel() > 1 for x in points)
    for leaf in _leaves(r):
        if id(leaf) not in trained and (isinstance(leaf, nn.Parameter) or (numbers and leaf.numel() == 1)):
            return (
                f"the residual {name!r} depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient, but "
                "is not trained: to train it, make it a parameter of the model, model.k = nn.Parameter(…), before "
                "GaussNewton is made; otherwise detach() it"
            )
    return ""


def _leaves(r: Tensor) -> Iterator[Tensor]:
    """Return the tensors at which the graph of residuals ends."""
    waiting: list[Any] = [r.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            yield node.variable
        new = {successor for successor, _ in node.next_functions} - seen
        seen |= new
        waiting += new
