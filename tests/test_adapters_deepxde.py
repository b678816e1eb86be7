"""Problems of DeepXDE: their loss is that of GaussNewton, and a step is that of the equation by hand."""

import os

import pytest
import torch
from by_hand import PLAIN, agree, by_hand, flat, slopes
from torch import nn

os.environ.setdefault("DDE_BACKEND", "pytorch")  # read when deepxde is imported

pytestmark = [
    pytest.mark.filterwarnings("default"),  # what other libraries warn of is theirs
    pytest.mark.usefixtures("float64"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def dde():
    dde = pytest.importorskip("deepxde")
    if dde.backend.backend_name != "pytorch":
        pytest.skip("DeepXDE runs on another backend")
    dde.config.set_default_float("float64")
    return dde


def two_equations(dde, unknown=1.0):
    """A system of two equations with one condition of each kind of points: values, slopes, pairs, data."""

    def equations(x, y):
        bend = dde.grad.hessian(y, x, component=0, i=0, j=0) + dde.grad.hessian(y, x, component=0, i=1, j=1)
        return [bend + unknown * y[:, 1:], dde.grad.jacobian(y, x, i=1, j=0) - y[:, :1] ** 2]

    square = dde.geometry.Rectangle([0, 0], [1, 1])

    def right(x, on):  # without its ends, where DeepXDE takes the mean of two normals
        return on and x[0] > 0.99 and 0.01 < x[1] < 0.99

    data = dde.icbc.PointSetBC(torch.rand(3, 2).numpy(), torch.rand(3, 1).numpy(), component=1)
    conditions = [
        dde.icbc.DirichletBC(square, lambda x: x[:, :1] ** 2, lambda x, on: on and x[1] > 0.99),
        dde.icbc.NeumannBC(square, lambda x: x[:, 1:], right),
        dde.icbc.PeriodicBC(square, 0, lambda x, on: on and x[0] < 0.01, component=1),
        data,
    ]
    distribution = {"num_domain": 5, "num_boundary": 12, "train_distribution": "uniform"}
    return dde.data.PDE(square, equations, conditions, **distribution), data


def terms_by_hand(u, points, data, unknown=1.0):
    """The residuals of `two_equations`, with their points, for one term for each of DeepXDE's losses."""
    top, right, pairs, values, inside = points
    left, opposite = pairs.chunk(2)

    def second(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(u(x)[:, 1].sum(), x, create_graph=True)[0][:, :1]

    terms = {
        "eq_0": lambda x: slopes(u, x)[2].sum(1, keepdim=True) + unknown * u(x)[:, 1:],
        "eq_1": lambda x: second(x) - u(x)[:, :1] ** 2,
        "bc_0": lambda x: u(x)[:, :1] - x[:, :1] ** 2,
        "bc_1": lambda x: slopes(u, x)[1][:, :1] - x[:, 1:],
        "bc_2": lambda a, b: u(a)[:, 1:] - u(b)[:, 1:],
        "bc_3": lambda x: u(x)[:, 1:] - data.values,
    }
    given = [(inside,), (inside,), (top,), (right,), (left, opposite), (values,)]
    return terms, dict(zip(terms, given, strict=True))


def points_of(data):
    x = torch.as_tensor(data.train_x)
    return x.split([*data.num_bcs, len(x) - sum(data.num_bcs)])


@pytest.mark.parametrize("loss_weights", [None, [1.0, 3.0, 10.0, 0.5, 2.0, 4.0]])
def test_an_iteration_of_deepxde_is_the_step_by_hand_on_deepxdes_loss(dde, loss_weights):
    from tengrad_triton.adapters.deepxde import compile_least_squares

    data, values = two_equations(dde)
    u = dde.nn.FNN([2, 6, 2], "tanh", "Glorot normal")
    model = dde.Model(data, u)
    terms, points = terms_by_hand(u, points_of(data), values)
    weights = dict(zip(terms, loss_weights or [1.0] * 6, strict=True))
    loss, step = by_hand(u, terms, weights, points)
    model.compile("sgd", lr=0.0, loss_weights=loss_weights, verbose=0)
    model.train(iterations=1, verbose=0)
    first = flat(u.parameters())
    optimizer = compile_least_squares(model, loss_weights=loss_weights, **PLAIN)
    model.train(iterations=1, verbose=0)
    assert model.losshistory.loss_train[0].sum() == pytest.approx(loss.item(), rel=1e-12)
    assert optimizer.stats.loss == pytest.approx(loss.item(), rel=1e-12)
    assert optimizer.stats.attempts == 1
    assert agree(first - flat(u.parameters()), step)


def test_the_loss_of_an_evolution_in_deepxde(dde):
    """An initial condition, a Robin condition and an operator, as DeepXDE itself sums them."""
    from tengrad_triton.adapters.deepxde import compile_least_squares

    def heat(x, y):
        return dde.grad.jacobian(y, x, i=0, j=1) - dde.grad.hessian(y, x, i=0, j=0)

    line = dde.geometry.GeometryXTime(dde.geometry.Interval(0, 1), dde.geometry.TimeDomain(0, 1))
    conditions = [
        dde.icbc.IC(line, lambda x: x[:, :1], lambda _, at_start: at_start),
        dde.icbc.RobinBC(line, lambda x, y: y - 1, lambda x, on: on and x[0] > 0.5),
        dde.icbc.OperatorBC(line, lambda x, y, _: y + x[:, :1] * y, lambda x, on: on and x[0] < 0.5),
    ]
    data = dde.data.TimePDE(line, heat, conditions, num_domain=6, num_boundary=8, num_initial=4)
    model = dde.Model(data, dde.nn.FNN([2, 6, 1], "tanh", "Glorot normal"))
    loss_weights = [1.0, 2.0, 3.0, 4.0]
    model.compile("sgd", lr=0.0, loss_weights=loss_weights, verbose=0)
    model.train(iterations=1, verbose=0)
    optimizer = compile_least_squares(model, loss_weights=loss_weights, **PLAIN)
    model.train(iterations=1, verbose=0)
    assert optimizer.stats.loss == pytest.approx(model.losshistory.loss_train[0].sum(), rel=1e-12)


def test_an_unknown_of_deepxdes_equation_is_trained(dde):
    from tengrad_triton.adapters.deepxde import compile_least_squares

    unknown = dde.Variable(2.0)
    data, values = two_equations(dde, unknown)
    u = dde.nn.FNN([2, 6, 2], "tanh", "Glorot normal")
    model = dde.Model(data, u)
    terms, points = terms_by_hand(u, points_of(data), values, unknown)
    both = nn.Module()
    both.u = u
    optimizer_of = compile_least_squares(model, external_trainable_variables=[unknown], **PLAIN)
    trained = [*u.parameters(), unknown]
    first = flat(trained)
    both.parameters = lambda: iter(trained)
    loss, step = by_hand(both, terms, {}, points)
    model.train(iterations=1, verbose=0)
    assert optimizer_of.stats.loss == pytest.approx(loss.item(), rel=1e-12)
    moved = first - flat(trained)
    assert moved[-1] != 0
    assert agree(moved, step)


def test_new_points_of_deepxde_take_part_with_their_own_values(dde):
    """DeepXDE itself remembers the values of a condition by the id of its points, which a later array may have."""
    from tengrad_triton.adapters.deepxde import compile_least_squares

    square = dde.geometry.Rectangle([0, 0], [1, 1])
    boundary = dde.icbc.DirichletBC(square, lambda x: x[:, :1] + 2 * x[:, 1:], lambda _, on: on)
    data = dde.data.PDE(
        square, lambda x, y: dde.grad.hessian(y, x, i=0, j=0), boundary, 5, 9, train_distribution="pseudo"
    )
    u = dde.nn.FNN([2, 6, 1], "tanh", "Glorot normal")
    model = dde.Model(data, u)
    optimizer = compile_least_squares(model, **PLAIN)
    for _ in range(8):
        data.resample_train_points()
        edge, inside = points_of(data)
        expected = (u(edge) - edge[:, :1] - 2 * edge[:, 1:]).square().mean()
        expected = expected + slopes(u, inside)[2][:, 0].square().mean()
        model.train(iterations=1, verbose=0)
        assert optimizer.stats.loss == pytest.approx(expected.item(), rel=1e-12)


def test_what_is_no_residual_of_deepxde_is_refused(dde):
    from tengrad_triton.adapters.deepxde import compile_least_squares

    data, _ = two_equations(dde)
    regular = dde.nn.FNN([2, 6, 2], "tanh", "Glorot normal", regularization=["l2", 1e-3])
    with pytest.raises(ValueError, match="a regularizer is no residual"):
        compile_least_squares(dde.Model(data, regular))
    plain = dde.nn.FNN([2, 6, 2], "tanh", "Glorot normal")
    with pytest.raises(ValueError, match="loss_weights has 2 entries for 2 equations and 4 conditions"):
        compile_least_squares(dde.Model(data, plain), loss_weights=[1, 1])
    function = dde.data.Function(dde.geometry.Interval(0, 1), lambda x: x, 4, 4)
    with pytest.raises(TypeError, match=r"must be a deepxde\.data\.PDE or TimePDE, got Function"):
        compile_least_squares(dde.Model(function, plain))
    square = dde.geometry.Rectangle([0, 0], [1, 1])
    nowhere = dde.icbc.DirichletBC(square, lambda x: 0 * x[:, :1], lambda _, on: False)
    with pytest.raises(ValueError, match="condition 0, a DirichletBC, has no points"):
        compile_least_squares(dde.Model(dde.data.PDE(square, lambda x, y: y, nowhere, 5, 9), plain))
