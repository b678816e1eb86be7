"""A damped Gauss-Newton step by hand, one backward pass a residual, for equations written with autograd alone."""

import math

import torch
from torch import nn

DAMPING = 30.0  # so much that the first attempt lowers the loss
PLAIN = {"damping": DAMPING, "acceleration": False, "spring": 0.0}
TOLERANCE = 1e-9


def mlp(outputs=1):
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs))


def slopes(u, x):
    """Return the value [N, 1], and the first and second derivatives [N, D] of the first output, by autograd alone."""
    x = x.detach().requires_grad_()
    value = u(x)[:, :1]
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(x.shape[1])]
    return value, first, torch.stack(second, 1)


def source(x):
    return 2 * math.pi**2 * (math.pi * x).sin().prod(1, keepdim=True)


def by_hand(module, terms, weights, points):
    """Return the loss Σ w mean(r²) and (Jᵀ J + α I)⁻¹ Jᵀ r as one vector, with one backward pass a residual."""
    trained, residuals, rows = list(module.parameters()), [], []
    for name, residual in terms.items():
        r = residual(*points[name])
        share = (weights.get(name, 1.0) / r.numel()) ** 0.5
        for entry in share * r.flatten():
            grads = torch.autograd.grad(entry, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
            residuals.append(entry.detach())
    j, r = torch.stack(rows), torch.stack(residuals)
    return r @ r, torch.linalg.solve(j.mT @ j + DAMPING * torch.eye(j.shape[1]), j.mT @ r)


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def agree(actual, expected):
    return (actual - expected).norm() <= TOLERANCE * expected.norm()
