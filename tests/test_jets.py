"""Derivatives with respect to the inputs are those of torch.func, for every module."""

import pytest
import torch
from derivative_cases import (
    NETWORKS,
    WIDTH,
    D,
    Mine,
    O,
    PlainNorm,
    PlainRadius,
    Radius,
    Residual,
    Sine,
    assert_same,
    mlp,
    network,
    points,
    reference,
)
from torch import nn
from torch.func import hessian
from torch.nn.utils import weight_norm

from tengrad_triton import derivatives, laplacian
from tengrad_triton.jets import Jet, register, register_activation, through
from tengrad_triton.jets.activations import ACTIVATIONS
from tengrad_triton.jets.rules import RULES


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own hessian of GLU
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("as_function", [False, True], ids=["module", "function"])
def test_derivatives_are_those_of_torch_func(name, as_function):
    u, x = network(name), points()
    called = u.__call__ if as_function else u
    value, first, second = reference(u, x)
    assert_same(derivatives(called, x), (value, first, second))
    assert_same(derivatives(called, x, second=False), (value, first))
    assert_same(derivatives(called, x, [2, 0]), (value, first[:, [2, 0]], second[:, [2, 0]]))
    assert_same([laplacian(called, x), laplacian(called, x, [1])], [second.sum(1), second[:, 1]])
    with torch.no_grad():
        assert_same([laplacian(called, x)], [second.sum(1)])


PLAIN = {
    "layer norm": (lambda: nn.LayerNorm(WIDTH), PlainNorm),
    "radius": (Radius, PlainRadius),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_through_what_torch_gets_wrong(name):
    torch.manual_seed(0)
    layer, plain = (make() for make in PLAIN[name])
    u, x = mlp(layer, nn.Tanh()).double(), points()
    wanted = mlp(plain, nn.Tanh()).double()
    wanted.load_state_dict(u.state_dict(), strict=False)
    places = [list(network[0].parameters()) for network in (u, wanted)]
    result = torch.autograd.grad(laplacian(u, x).square().sum(), places[0])
    assert_same(result, torch.autograd.grad(reference(wanted, x)[2].sum(1).square().sum(), places[1]))


def test_points_that_are_mixed_move_together():
    torch.manual_seed(0)
    u, x = mlp(nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.Tanh()).double(), points()
    second = hessian(lambda shift_D: u(x + shift_D))(torch.zeros(D, dtype=x.dtype)).diagonal(dim1=2, dim2=3).mT
    assert_same([derivatives(u, x).second, laplacian(u, x)], [second, second.sum(1)])


@pytest.mark.parametrize("u", [mlp(nn.Tanh()), Mine()], ids=["module", "own forward"])
def test_no_point_and_one_point(u):
    u.double()
    assert laplacian(u, points()[:0]).shape == (0, O)
    assert_same(derivatives(u, points()[:1]), [part[:1] for part in derivatives(u, points())])


def test_all_directions_see_the_same_dropout():
    u = nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Dropout(0.5), nn.Unflatten(1, (64, 1)), nn.Flatten())
    value, first, second = derivatives(u.double(), points())
    dropped = value == 0
    assert 0 < dropped.sum() < dropped.numel()
    for part in (first, second):
        assert torch.equal(part == 0, dropped[:, None].expand_as(part))


def test_a_registered_rule_is_taken_and_is_not_that_of_a_subclass():
    calls = []

    @register_activation(Sine)
    def sine(layer, z):
        calls.append("sine")
        return z.sin(), z.cos(), -z.sin()

    @register(Residual)
    def residual(layer, jet):
        calls.append("residual")
        return Jet(*(before + after for before, after in zip(jet, through(layer.inner, jet), strict=True)))

    class Cosine(Sine):
        def forward(self, z):
            return z.cos()

    try:
        u, x = mlp(Sine(), Residual(nn.Linear(WIDTH, WIDTH)), Cosine()).double(), points()
        assert_same(derivatives(u, x), reference(u, x))
        assert calls == ["sine", "residual"] * 2
    finally:
        del ACTIVATIONS[Sine], RULES[Residual]


def test_an_output_of_one_number_a_point():
    def u(x):
        return x.square().prod(1)

    x = points()
    d = derivatives(u, x)
    assert_same([*d, laplacian(u, x)], [*reference(lambda x: u(x)[:, None], x), d.second.sum(1)])


def running(x):
    return nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)


def determinant(x):
    return torch.linalg.det(x[:, :1, None])[:, None]


X = torch.zeros(4, 3)
BAD = {
    "no tensor": (lambda: laplacian(torch.sin, [1.0]), TypeError, "points came as list"),
    "integers": (lambda: laplacian(torch.sin, X.long()), TypeError, "torch.int64"),
    "one point": (lambda: laplacian(torch.sin, X[0]), ValueError, r"\[3\], but \[N, D\]"),
    "coordinate too high": (lambda: laplacian(torch.sin, X, [0, 3]), ValueError, "coordinates 0 to 2"),
    "coordinate negative": (lambda: derivatives(torch.sin, X, [-1]), ValueError, "coordinates 0 to 2"),
    "coordinate twice": (lambda: laplacian(torch.sin, X, [1, 1]), ValueError, "each once"),
    "no coordinate": (lambda: laplacian(torch.sin, X, []), ValueError, "at least one"),
    "number": (lambda: laplacian(torch.sum, X), ValueError, r"u returned \[\] for 4 points"),
    "too many dimensions": (lambda: laplacian(lambda x: x[:, None], X), ValueError, r"\[4, 1, 3\]"),
    "points lost": (lambda: laplacian(lambda x: x[:2], X), ValueError, r"\[2, 3\] for 4 points"),
    "tuple": (lambda: laplacian(lambda x: (x, x), X), TypeError, "returned tuple"),
    "running statistics": (lambda: laplacian(running, X), ValueError, "call eval"),
    "batch norm in training": (lambda: laplacian(nn.BatchNorm1d(3), X), RuntimeError, "mutate a captured Tensor"),
    "determinant": (lambda: laplacian(determinant, X), NotImplementedError, "linalg_det are wrong"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_differentiated_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_old_weight_norm_runs_its_hook():
    with pytest.warns(FutureWarning):
        u = mlp(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()).double()
    assert_same(derivatives(u, points()), reference(u, points()))
