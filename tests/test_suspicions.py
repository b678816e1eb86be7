"""What runs, but is seldom meant, is said once, at the user's line; the usual ways to write a residual say nothing."""

import warnings

import pytest
import torch
from torch import nn

from tengrad_triton import GaussNewton, laplacian

X = torch.linspace(0.1, 0.9, 24).double().view(12, 2)


def network(outputs=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


UNKNOWN, OTHER, FROZEN = (
    nn.Parameter(torch.ones((), dtype=X.dtype)),
    network(seed=1),
    network(seed=1).requires_grad_(False),
)


def by_autograd(u, k=1.0):
    """Return a residual function that makes its points a leaf of the graph."""

    def residual(x):
        x.requires_grad_()
        return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0].sum(1) - k

    return residual


def of_own(u):
    u.k = nn.Parameter(torch.ones((), dtype=X.dtype))
    return lambda x: laplacian(u, x) - u.k


SUSPICIOUS = {
    "[N, 1] − [N]": (lambda u: lambda x: u(x) - x[:, 0], "has 12 parts for each of its 12 points"),
    "a parameter beside the model": (
        lambda u: lambda x: laplacian(u, x) - UNKNOWN,
        "shape () that requires a gradient, but is not trained",
    ),
    "a tensor beside the model": (
        lambda u: by_autograd(u, torch.ones(1, dtype=X.dtype, requires_grad=True)),
        "shape (1,) that requires a gradient",
    ),
    "another network": (lambda u: lambda x: u(x) - OTHER(x), "but is not trained: to train it, make it"),
}
SILENT = {
    "a module": lambda u: u,
    "an unknown of the model": of_own,
    "points as leaves": by_autograd,
    "a frozen network": lambda u: lambda x: u(x) - FROZEN(x),
}


@pytest.mark.parametrize("case", SUSPICIOUS)
def test_what_is_seldom_meant_is_said_at_the_users_line(case):
    make, message = SUSPICIOUS[case]
    u = network()
    optimizer = GaussNewton(u, {"a": make(u)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            optimizer.step(a=X)
    assert [message in str(one.message) for one in said] == [True]
    assert said[0].filename == __file__


@pytest.mark.parametrize("case", SILENT)
def test_what_is_usual_is_not_said(case):
    u = network()
    optimizer = GaussNewton(u, {"a": SILENT[case](u)})
    for _ in range(2):
        optimizer.step(a=X)  # warnings are errors in these tests
    assert optimizer.stats.step == 1


def test_a_system_of_as_many_equations_as_points_is_usual_for_few_points():
    u = network(outputs=2)
    GaussNewton(u, {"start": u}).step(start=X[:2])


def test_a_single_point_in_one_dimension_is_no_unknown():
    torch.manual_seed(0)
    u = nn.Linear(1, 1).double()
    GaussNewton(u, {"start": by_autograd(u)}).step(start=X[:1, :1])


def without_graph(u):
    def residual(x):
        x.requires_grad_()
        y = u(x)
        return torch.autograd.grad(y.sum(), x, retain_graph=True)[0].sum(1, keepdim=True) - y

    return residual


def test_a_part_without_a_graph_is_said_when_no_step_lowers_the_loss():
    u = network()
    optimizer = GaussNewton(u, {"slope": without_graph(u), "edge": lambda x: u(x) - 1})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        while not optimizer.stopped:
            optimizer.step(slope=X, edge=X[:1])
        theta = nn.utils.parameters_to_vector(u.parameters())
        optimizer.step(slope=X, edge=X[:1])
    assert ["by the residual 'slope': a part of it has no graph" in str(one.message) for one in said] == [True]
    assert torch.equal(nn.utils.parameters_to_vector(u.parameters()), theta)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])  # with ReLU steps end in a kink
def test_a_minimum_where_steps_stop_says_nothing_of_graphs(activation):
    u = network()
    u[1] = activation()
    optimizer = GaussNewton(u, {"a": lambda x: u(x) - x[:, :1].round(), "b": lambda x: u(x) - 2})
    random = torch.get_rng_state()
    while not optimizer.stopped:
        optimizer.step(a=X, b=X)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_of_the_users_says_in_which_residual():
    u = network()
    with pytest.raises(RuntimeError) as error:
        GaussNewton(u, {"inside": u}).step(inside=X[:, 0])
    assert error.value.__notes__ == ["in the residual 'inside', at points of shape (12,)"]
