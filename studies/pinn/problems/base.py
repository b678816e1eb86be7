"""What a problem of the study is made of: a network, residuals, points, and how far the network is from the solution.

Key: N points, D coordinates, O outputs. In problems with time, coordinate 0 is time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Points = dict[str, Any]
"""The points of each term: a tensor [N, D], or a tuple of the tensors that the term's residual takes."""
Residual = Callable[..., Tensor]
Field = Callable[[Tensor], Tensor]


def relative_l2(problem: Problem, model: nn.Module) -> float:
    """Return ‖model − u‖ / ‖u‖ over the evaluation points."""
    x_ND = problem.evaluation()
    u_NO = problem.solution(x_ND)
    return ((model(x_ND) - u_NO).norm() / u_NO.norm()).item()


@dataclass(frozen=True)
class Problem:
    """A differential equation, the network that shall solve it, and its points.

    Attributes:
        name: the name on the command line, and of files.
        title: the equation, for the page.
        source: where network, points and conditions are from.
        build: returns the network in float64, whose first weights follow from torch's global generator.
        terms: returns the residual function of each term, given the model; a residual is [N, O].
        points: draws the points of each term with a generator.
        fresh_every: after how many steps the points are drawn anew; 0 is never.
        solution: returns u [N, O] at points [N, D], in float64.
        evaluation: returns the points [N, D] of the error, always the same.
        weights: the weights of terms where they are not 1.
        measured: what `error` returns, in words.
        measure: returns it, given the problem and a model.
        note: returns a sentence for the page, or nothing.
    """

    name: str
    title: str
    source: str
    build: Callable[[], nn.Module]
    terms: Callable[[nn.Module], dict[str, Residual]]
    points: Callable[[torch.Generator], Points]
    fresh_every: int
    solution: Field
    evaluation: Callable[[], Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    measured: str = "relative L2 error of u"
    measure: Callable[[Problem, nn.Module], float] = relative_l2
    note: Callable[[], str] = str

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Return how far a model is from the solution; 0 is exact."""
        return self.measure(self, model)

    def root_mean_square(self) -> float:
        """Return the root of the mean of u² over the evaluation points: it turns a relative error into an absolute one.

        Dangel, Müller and Zeinhofer publish absolute ones.
        """
        return self.solution(self.evaluation()).square().mean().sqrt().item()


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with tanh between them, with torch's default weights, drawn in float32, in float64."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def loss(problem: Problem, terms: Mapping[str, Residual], points: Points) -> Tensor:
    """Return Σ w mean(r²) over the terms."""
    total = torch.zeros((), dtype=torch.float64)
    for name, given in points.items():
        residual_NO = terms[name](*inputs_of(given))
        total = total + problem.weights.get(name, 1.0) * residual_NO.square().mean()
    return total


def inputs_of(points: Any) -> tuple[Tensor, ...]:
    """Return the arguments of a term's residual function."""
    return points if isinstance(points, tuple) else (points,)


def start(problem: Problem, seed: int) -> nn.Module:
    """Return the model with its first weights, which depend on the seed alone; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return problem.build()
