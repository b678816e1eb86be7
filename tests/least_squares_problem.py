"""A small least-squares problem for `GaussNewton`, and its dense Gauss-Newton steps.

Dimensions: R residuals of all terms, K entries of the trained parameters.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tengrad_triton import GaussNewton, laplacian

WEIGHTS = {"interior": 1.0, "boundary": 3.0}


class Equation:
    """Δu + sin(x) + sin(y) at points, of a model that copies of this function have a copy of."""

    def __init__(self, u):
        self.u = u

    def __call__(self, x):
        return laplacian(self.u, x)[:, 0] + x.sin().sum(1)


class EquationByAutograd(Equation):
    """The same, with `torch.autograd.grad`."""

    def __call__(self, x):
        x = x.requires_grad_()
        (first,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        parts = [torch.autograd.grad(first[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)]
        return sum(parts) + x.sin().sum(1)


@dataclass
class Problem:
    """A model with its terms and points."""

    u: nn.Module
    residuals: dict[str, Any]
    points: dict[str, Any]
    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))

    @property
    def parameters(self):
        return [p for p in self.u.parameters() if p.requires_grad]

    @property
    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def write(self, theta_K):
        with torch.no_grad():
            nn.utils.vector_to_parameters(theta_K, self.parameters)

    def optimizer(self, **settings):
        weights = {name: weight for name, weight in self.weights.items() if weight != 1}
        return GaussNewton(self.u, self.residuals, weights=weights, **settings)

    def terms(self, points=None):
        """Return the scaled residuals of each term at points, with a graph."""
        found = {}
        for name, residual in self.residuals.items():
            x = (points or self.points)[name].clone()
            r = residual(x).flatten()
            found[name] = (self.weights[name] / len(r)) ** 0.5 * r
        return found

    def r_at(self, theta_K):
        """Return r̃ at other parameters, and leave the model as it is."""
        before = self.theta
        self.write(theta_K)
        r_R = torch.cat(list(self.terms().values())).detach()
        self.write(before)
        return r_R

    def loss_at(self, theta_K):
        return float(self.r_at(theta_K).square().sum())

    def jacobian(self, points=None):
        """Return r̃ and J̃, by one backward pass for each residual."""
        r_R = torch.cat(list(self.terms(points).values()))
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(r, self.parameters, **options)]) for r in r_R]
        return r_R.detach(), torch.stack(rows)


def poisson(interior=40, boundary=20, equation=Equation, width=4):
    """With the default there are 60 residuals and 17 parameters; with 5 and 3 points there are fewer residuals."""
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
    points = {"interior": torch.rand(interior, 2).double(), "boundary": torch.rand(boundary, 2).double()}
    return Problem(u, {"interior": equation(u), "boundary": u}, points)


def solved(j_RK, v_R, alpha, columns=None):
    """Return (J̃ᵀJ̃ + αI)⁻¹ J̃ᵀ v, of the blocks of columns alone if there are any."""
    gram_KK = j_RK.mT @ j_RK
    if columns is not None:
        mask_KK = torch.zeros_like(gram_KK)
        for own in columns:
            mask_KK[own[:, None], own] = 1
        gram_KK = gram_KK * mask_KK
    return torch.linalg.solve(gram_KK + alpha * torch.eye(len(gram_KK)).double(), j_RK.mT @ v_R)


def curve(problem, delta_K, r_R, j_RK, alpha, columns=None, probe=0.1):
    """Return the geodesic acceleration q, whose second derivative is a difference with a step of ``probe``."""
    ahead_R = problem.r_at(problem.theta - probe * delta_K)
    second_R = 2 / probe * ((ahead_R - r_R) / probe + j_RK @ delta_K)
    return 0.5 * solved(j_RK, second_R, alpha, columns)
