"""`Residuals` as the model of `TENGraD`: its step is the dense Gauss-Newton step of all terms."""

import pytest
import torch
from torch import nn

from tengrad_triton import GaussNewton, Residuals, TENGraD, laplacian

DAMPING = 1e-3


def by_autograd(u):
    def equation(x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
        return sum(torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)) + 1

    return equation


EQUATIONS = {
    "no derivatives": lambda u: lambda x: u(x) ** 2,
    "two outputs": lambda u: lambda x: torch.cat([u(x), u(x) ** 2 - 1], 1),
    "jets": lambda u: lambda x: laplacian(u, x)[:, 0] + 1,
    "torch.func": lambda u: (
        lambda x: torch.func.vmap(torch.func.hessian(lambda y: u(y)[0]))(x).diagonal(0, 1, 2).sum(1)
    ),
    "autograd": by_autograd,
}


def model_of(name):
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    points = {"inside": torch.rand(20, 2).double(), "edge": torch.rand(7, 2).double()}
    return u, Residuals(u, {"inside": EQUATIONS[name](u), "edge": u}, weights={"edge": 10.0}), points


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("blocks", ["network", "layer"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_tengrad_takes_the_dense_step_of_all_terms(name, blocks):
    u, model, points = model_of(name)
    parameters = list(u.parameters())
    r = model(**points)
    options = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    j = torch.stack([flat(torch.autograd.grad(entry, parameters, **options)) for entry in r])
    hessian = 2 * j.T @ j / len(r)
    if blocks == "layer":
        of_first = torch.arange(len(hessian)) < 24
        hessian = hessian * (of_first[:, None] == of_first)
    damped = hessian + DAMPING * torch.eye(len(hessian)).double()
    expected = torch.linalg.solve(damped, 2 * j.T @ r.detach() / len(r))
    before = flat(parameters)
    optimizer = TENGraD(
        model, lr=1.0, damping=DAMPING, scaling="none", momentum=0.0, fisher="exact", likelihood="gaussian",
        blocks=blocks, refresh_every=1,
    )  # fmt: skip
    optimizer.zero_grad()
    model(**points).square().mean().backward()
    optimizer.step()
    assert (before - flat(parameters) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_is_that_of_gauss_newton(name):
    u, model, points = model_of(name)
    optimizer = GaussNewton(u, {"inside": EQUATIONS[name](u), "edge": u}, weights={"edge": 10.0})
    torch.testing.assert_close(model(**points).square().mean().detach(), optimizer.loss(**points), rtol=1e-12, atol=0)
