"""Small problems for the rivals of the study of physics-informed networks, and their dense rows."""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call, jacrev

from studies.pinn.problems import PROBLEMS
from studies.pinn.problems.base import mlp
from studies.pinn.rivals import descent

NETWORKS = {
    "poisson2d": (2, 7, 1),
    "poisson5d": (5, 6, 4, 1),
    "poisson10d": (10, 4, 5, 3, 1),
    "heat1d": (2, 5, 4, 1),
    "heat4d": (5, 6, 1),
    "burgers": (2, 4, 1),
    "convection": (2, 4, 1),
    "convection-fresh": (2, 4, 1),
}
LINEAR = ("poisson2d", "poisson5d", "poisson10d", "heat1d", "heat4d")
DAMPING = 0.1


def small(name):
    """Return a problem with uneven weights, a small network, and a few points of each term."""
    problem = PROBLEMS[name]
    problem = replace(problem, weights={**problem.weights, "boundary": 3.0})
    torch.manual_seed(0)
    model = mlp(*NETWORKS[name]) if name in NETWORKS else problem.build()
    drawn = problem.points(torch.Generator().manual_seed(0))
    points = {}
    for place, (term, x) in enumerate(drawn.items()):
        count = 9 - 2 * place
        points[term] = tuple(part[:count] for part in x) if isinstance(x, tuple) else x[:count]
    return problem, model, points


def eye(size):
    """Return the identity in float64."""
    return torch.eye(size, dtype=torch.float64)


class Residuals(nn.Module):
    """All residuals of a problem as the output of a module, for torch.func."""

    def __init__(self, problem, model):
        super().__init__()
        self.model, self.problem = model, problem
        self.terms = problem.terms(model)

    def forward(self, points):
        parts = []
        for name, x in points.items():
            residual = self.terms[name](*(x if isinstance(x, tuple) else (x,))).flatten()
            parts.append(math.sqrt(self.problem.weights.get(name, 1.0) / len(residual)) * residual)
        return torch.cat(parts)


def dense(problem, model, points):
    """Return r and J by torch.func."""
    module = Residuals(problem, model)
    names = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    by_name = jacrev(lambda parameters: functional_call(module, parameters, (points,)))(names)
    return module(points).detach(), torch.cat(
        [by_name[name].reshape(-1, names[name].numel()) for name in names], 1
    ).detach()


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def direction_of(rival, points):
    """Return the direction of a step, and move the parameters by a hundredth of it: the next step is elsewhere."""
    direction, _ = rival.direction(points)
    direction = direction.clone()
    descent.move(rival.squares, direction, 0.01)
    rival.steps += 1
    return direction
