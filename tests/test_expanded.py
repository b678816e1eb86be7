"""Rows from a copy of the weights for each sample, against one backward pass for each residual, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from tengrad_triton import derivatives, laplacian
from tengrad_triton.residuals.expanded import NotExpandableError, expanded_rows, residuals_and_rows

WIDTH = 5
TOLERANCE = 1e-12  # a few hundred roundings of float64


class Mixed(nn.Module):
    """Parameters in matrix products, in elementwise operations, and in functions of parameters alone."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.utils.parametrizations.weight_norm(nn.Linear(2 * WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, 2)
        self.last.bias.requires_grad_(False)  # of a trained layer
        self.frequencies = nn.Parameter(torch.randn(2, WIDTH))
        self.rate, self.shift = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([0.7]))
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.arange(1.0, WIDTH + 1))

    def forward(self, x_ND):
        phase = x_ND @ (self.mask * self.frequencies * self.rate.exp())
        h = torch.tanh(self.hidden(torch.cat([phase.sin(), phase.cos()], 1)))
        return self.last(self.norm(self.frozen(h))) + self.shift


def mixed():
    return Mixed()


def mlp():
    return nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2))


def values(u, x_ND):
    return u(x_ND)


def laplacian_by_autograd(u, x_ND):
    x_ND = x_ND.clone().requires_grad_()
    y_N = u(x_ND)[:, 0]
    first_ND = torch.autograd.grad(y_N.sum(), x_ND, create_graph=True)[0]
    second = [torch.autograd.grad(first_ND[:, d].sum(), x_ND, create_graph=True)[0][:, d] for d in range(2)]
    return sum(second) + y_N**3


def system_by_autograd(u, x_ND):
    x_ND = x_ND.clone().requires_grad_()
    y_NO = u(x_ND)
    slopes = [torch.autograd.grad(y_NO[:, o].sum(), x_ND, create_graph=True)[0] for o in range(2)]
    return torch.stack([slopes[0][:, 0] * y_NO[:, 1], slopes[1][:, 1] - y_NO[:, 0], slopes[0][:, 1]], 1)


def slope_by_jvp(u, x_ND):
    return jvp(u, (x_ND,), (torch.ones_like(x_ND),))[1]


def two_ends(u, x_ND):
    """A periodic condition: the network runs once, on both ends."""
    both = torch.cat([x_ND, -x_ND]).requires_grad_()
    y_N = u(both)[:, 0]
    slope_N = torch.autograd.grad(y_N.sum(), both, create_graph=True)[0][:, 1]
    n = len(x_ND)
    return torch.stack([y_N[:n] - y_N[n:], slope_N[:n] - slope_N[n:]], 1)


def system_by_jets(u, x_ND):
    d = derivatives(u, x_ND)
    return d.value[:, :1] * d.first[:, 0] - d.second[:, 1] + laplacian(u, x_ND)


RESIDUALS = [values, laplacian_by_autograd, system_by_autograd, slope_by_jvp, two_ends, system_by_jets]


def one_backward_a_residual(model, residual, *points):
    r = residual(*points)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(entry, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in r.flatten()
    ]
    return r.detach(), [torch.stack(parts).view(*r.shape, *parts[0].shape) for parts in zip(*rows, strict=True)]


# As many samples as some of the tensors without samples have entries, too.
@pytest.mark.parametrize(
    ("residual", "samples"),
    [(residual, n) for residual in RESIDUALS for n in (1, 2, 4, WIDTH) if (residual, n) != (system_by_jets, 2)],
)
@pytest.mark.parametrize("make", [mlp, mixed])
def test_rows_are_those_of_one_backward_a_residual(make, residual, samples):
    torch.manual_seed(0)
    model = make().double()
    x_ND = torch.randn(samples, 2, dtype=torch.float64)
    expected_r, expected = one_backward_a_residual(model, lambda x: residual(model, x), x_ND)
    with torch.no_grad():  # as within an optimizer's step
        r, rows = residuals_and_rows(model, lambda x: residual(model, x), x_ND)
    torch.testing.assert_close(r, expected_r, rtol=TOLERANCE, atol=TOLERANCE)
    assert [j.shape for j in rows] == [j.shape for j in expected]
    for actual, j in zip(rows, expected, strict=True):
        torch.testing.assert_close(actual, j, rtol=TOLERANCE, atol=TOLERANCE * max(1, j.abs().max()))


def test_several_inputs_and_a_parameter_of_the_equation():
    torch.manual_seed(0)
    u = mlp().double()
    u.conductivity = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    x_ND, source_N = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def residual(x_ND, source_N):
        return u.conductivity * laplacian_by_autograd(u, x_ND) - source_N

    def as_module(x_ND, source_N):
        return residual(x_ND, source_N)

    expected = one_backward_a_residual(u, residual, x_ND, source_N)[1]
    for actual, j in zip(expanded_rows(u, as_module, (x_ND, source_N)), expected, strict=True):
        torch.testing.assert_close(actual, j, rtol=TOLERANCE, atol=TOLERANCE)


class Hidden(torch.autograd.Function):
    """Multiplies where no function mode looks."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        return grad_y * weight, (grad_y * x).sum(0)


def mean_of_batch(u, x_ND):
    return u(x_ND) - u(x_ND).mean()


def hidden_product(u, x_ND):
    return Hidden.apply(u(x_ND), u[0].bias[:2])


def weights_as_unknowns(u, x_ND):
    return u(x_ND) + torch.autograd.grad(u(x_ND).sum(), u[0].weight, create_graph=True)[0].sum()


def without_samples(u, x_ND):
    return u[0].weight.square()


def without_parameters(u, x_ND):
    return x_ND.square()


def complex_numbers(u, x_ND):
    return torch.complex(u(x_ND), x_ND)


def one_number(u, x_ND):
    return u(x_ND).sum()


def pairs_in_another_order(u, x_ND):
    return u(x_ND.repeat_interleave(2, 0) * torch.arange(2 * len(x_ND))[:, None]).unflatten(0, (-1, 2)).sum(1)


def on_single_points(u, x_ND):
    weights = dict(u.named_parameters())
    return vmap(grad(lambda z_D: functional_call(u, weights, (z_D,)).sum()))(x_ND)


def test_jets_at_as_many_points_as_coordinates_are_refused():
    """Their first two dimensions, coordinates and points, cannot be told apart."""
    u = mlp().double()
    with pytest.raises(NotExpandableError):
        expanded_rows(u, lambda x: system_by_jets(u, x), torch.randn(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (mean_of_batch, "mixes samples"),
        (hidden_product, "mixes samples, or hands parameters to code that no mode sees"),
        (weights_as_unknowns, "differentiates with respect to parameters"),
        (without_samples, "residuals of 4 points are"),
        (without_parameters, "do not depend on trained parameters"),
        (complex_numbers, "the residuals are complex"),
        (one_number, "residuals of 4 points are"),
        (pairs_in_another_order, "."),
        (on_single_points, "."),
    ],
)
def test_what_has_no_such_rows_is_refused(residual, message):
    torch.manual_seed(0)
    u = mlp().double()
    before = [p.clone() for p in u.parameters()]
    with pytest.raises(NotExpandableError, match=message):
        expanded_rows(u, lambda x: residual(u, x), torch.randn(4, 2, dtype=torch.float64))
    assert all(torch.equal(p, kept) and p.grad is None for p, kept in zip(u.parameters(), before, strict=True))


def test_the_check_draws_the_same_random_numbers_and_moves_the_generator_once():
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, WIDTH), nn.Dropout(), nn.Linear(WIDTH, 1)).double()
    x_ND = torch.randn(4, 2, dtype=torch.float64)
    torch.manual_seed(1)
    expected_r, expected = one_backward_a_residual(u, u, x_ND)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    r, rows = residuals_and_rows(u, u, x_ND)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(r, expected_r)
    assert all(torch.allclose(actual, j) for actual, j in zip(rows, expected, strict=True))
