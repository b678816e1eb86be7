"""Every way finds the rows of a residual function: one `torch.autograd.grad` for each residual of the whole batch.

A row of the table makes a model and a residual function of it, and says which way serves it.
"""

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parametrizations

from tengrad_triton import derivatives, laplacian
from tengrad_triton.residuals.expanded import NotExpandableError
from tengrad_triton.residuals.rows import WAYS, RowFinder
from tengrad_triton.residuals.terms import Terms

N = 7
TOLERANCE = 1e-9


class Case(NamedTuple):
    """A model, its residual function, the way that serves it, and its points."""

    model: nn.Module
    residual: object
    way: str
    points: tuple


def network(inputs=2, outputs=1, width=6):
    layers = nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers).double()


def points(*shape):
    return torch.rand(N, *(shape or (2,)), dtype=torch.float64)


def plain():
    u = network()
    return Case(u, lambda x: u(x)[:, 0] ** 2 - x[:, 0], "batched", (points(),))


def forward_laplacian():
    u = network()
    return Case(u, lambda x: laplacian(u, x) + x.sin().sum(1, keepdim=True), "batched", (points(),))


def burgers():
    u = network()

    def residual(x):
        d = derivatives(u, x)
        return d.first[:, 0] + d.value * d.first[:, 1] - 0.1 * d.second[:, 1]

    return Case(u, residual, "batched", (points(),))


def functional_derivatives():
    u = network()

    def residual(x):
        value = lambda point: u(point[None])[0, 0]  # noqa: E731
        return vmap(hessian(value))(x).diagonal(dim1=1, dim2=2).sum(1) + vmap(jacrev(value))(x)[:, 0]

    return Case(u, residual, "batched", (points(),))


def autograd_derivatives():
    u = network()

    def residual(x):
        x = x.requires_grad_()
        value = u(x)
        (du,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        return second[:, 0] + value[:, 0] * du[:, 1]

    return Case(u, residual, "expanded", (points(),))


def points_that_require_a_gradient():
    u, x = network(), points().requires_grad_()
    return Case(u, lambda x: torch.autograd.grad(u(x).sum(), x, create_graph=True)[0], "expanded", (x,))


def several_outputs():
    u = network(outputs=3)
    return Case(u, lambda x: u(x) * torch.tensor([1.0, 2.0, 3.0]).double(), "batched", (points(),))


def outputs_of_autograd():
    u = network()

    def residual(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]

    return Case(u, residual, "expanded", (points(),))


def matrices():
    u = network(outputs=6)
    return Case(u, lambda x: u(x).view(-1, 2, 3).sin(), "batched", (points(),))


def several_inputs():
    u = network()
    return Case(u, lambda x, y: u(x)[:, 0] - u(x + 1)[:, 0] - y, "batched", (points(), torch.rand(N).double()))


def whole_numbers():
    u = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Case(u, lambda i, y: u(i)[:, 0] - y, "batched", (torch.arange(N) % 5, torch.rand(N).double()))


def module():
    u = network()
    return Case(u, u, "batched", (points(),))


class Tied(nn.Module):
    """Uses one matrix twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def tied(way="batched"):
    u = Tied().double()

    def by_autograd(x):
        x = x.requires_grad_()
        return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0][:, 0]

    return Case(u, by_autograd if way == "expanded" else lambda x: laplacian(u, x)[:, 0], way, (points(3),))


def parametrized(way="batched"):
    u = network()
    parametrizations.weight_norm(u[0])
    parametrizations.orthogonal(u[2])

    def by_autograd(x):
        x = x.requires_grad_()
        return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0][:, 0]

    return Case(u, by_autograd if way == "expanded" else u, way, (points(),))


def frozen():
    u = network()
    u[0].weight.requires_grad_(False)
    u[4].bias.requires_grad_(False)
    return Case(u, lambda x: laplacian(u, x), "batched", (points(),))


class Inverse(nn.Module):
    """A network and the unknown coefficient of its equation."""

    def __init__(self):
        super().__init__()
        self.u, self.nu = network(), nn.Parameter(torch.tensor(0.3).double())
        self.unused = nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        return self.nu * laplacian(self.u, x) - self.u(x)


def coefficient():
    model = Inverse()
    return Case(model, model, "batched", (points(),))


def captured_parameter():
    model = Inverse()
    nu = model.nu  # torch.func does not replace what a closure holds
    return Case(model, lambda x: nu * laplacian(model.u, x) - model.u(x), "captured", (points(),))


def captured_weight():
    u = network()
    w = u[0].weight
    return Case(u, lambda x: (u(x) - (x @ w.T).sum(1, keepdim=True)) * w.square().sum(), "captured", (points(),))


def mixed_points():
    u = network()
    return Case(u, lambda x: u(x) - u(x).mean(), "backward", (points(),))


def mean_of_points():
    u = network()
    return Case(u, lambda x: u(x - x.mean(0)), "expanded", (points(),))


def neighbours():
    u = network()
    return Case(u, lambda x: u(x) - u(x.roll(1, 0)), "expanded", (points(),))


def batch_norm():
    u = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Case(u, u, "backward", (points(),))


def batch_norm_in_eval():
    u = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    u(points())
    return Case(u.eval(), u, "batched", (points(),))


def dropout():
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    return Case(u, u, "expanded", (points(),))


def noise():
    u = network()
    return Case(u, lambda x: u(x + torch.randn_like(x)), "expanded", (points(),))


def spectral_norm():
    u = network()
    parametrizations.spectral_norm(u[2])
    return Case(u, u, "batched", (points(),))


def masked():
    u = network()

    def residual(x):
        inside = x[:, 0] > 0.5
        r = u(x)[:, 0]
        r = r.clone()
        r[inside] = u(x[inside])[:, 0] * 3
        return r

    return Case(u, residual, "backward", (points(),))


def whole_batch():
    u = network()
    return Case(u, lambda x: u(x) * len(x), "expanded", (points(),))


def two_batches():
    u = network()
    return Case(u, lambda x: u(x) - u(x.flip(1)) * u(torch.zeros_like(x)), "batched", (points(),))


def joined_batches():
    u = network()

    def residual(x):
        left, right = u(torch.cat([x, -x])).chunk(2)
        return left - right.square()

    return Case(u, residual, "batched", (points(),))


def joined_batches_of_autograd():
    u = network()

    def residual(x):
        x = x.requires_grad_()
        left, right = u(torch.cat([x, -x])).chunk(2)
        return torch.autograd.grad((left * right.square()).sum(), x, create_graph=True)[0]

    return Case(u, residual, "expanded", (points(),))


def fixed_points_beside():
    u, others = network(), points()
    return Case(u, lambda x: u(x) - u(others).mean() * x[:, :1], "batched", (points(),))


def squeezed():
    u = network()
    return Case(u, lambda x: u(x).squeeze(), "expanded", (points(),))


def cancelling():
    """The residual does not depend on the shift, in exact numbers."""
    u = network(outputs=3)
    u.register_parameter("shift", nn.Parameter(torch.tensor(0.7).double()))
    return Case(u, lambda x: (u(x).exp() * 3 + u.shift).softmax(1)[:, 0], "batched", (points(),))


def functional():
    u = network()
    return Case(u, lambda x: functional_call(u, dict(u.named_parameters()), x), "batched", (points(),))


def counted():
    """The model puts a new tensor in the place of a buffer."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = network()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.u(x) * self.calls.sin()

    model = Counted()
    return Case(model, model, "batched", (points(),))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


def own_function():
    u = network()
    return Case(u, lambda x: Cube.apply(u(x)), "expanded", (points(),))


def own_function_of_parameters():
    u = network()
    return Case(u, lambda x: u(x) * Cube.apply(u[0].weight).sum(), "backward", (points(),))


CASES = {
    name: make
    for name, make in list(globals().items())
    if callable(make) and getattr(make, "__module__", "") == __name__ and make not in (network, points)
    and not isinstance(make, type)
} | {
    "tied, by autograd": lambda: tied("expanded"),
    "parametrized, by autograd": lambda: parametrized("expanded"),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    case = CASES[name]()
    return case, [p for p in case.model.parameters() if p.requires_grad]


def one_by_one(case, parameters):
    """Return the residuals and, for each of them, its gradient, [R, k] of each parameter."""
    r = case.residual(*(x.clone().requires_grad_(x.requires_grad) for x in case.points))
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(entry, parameters, **options) for entry in r.flatten()]
    return r.detach().flatten(), [torch.stack([g.flatten() for g in part]) for part in zip(*grads, strict=True)]


def surroundings(model):
    return torch.get_rng_state(), [b.clone() for b in model.buffers()]


def assert_equal(found, expected):
    r, rows = expected
    assert (found[0].flatten() - r).norm() <= TOLERANCE * r.norm()
    size = sum(j.norm() for j in rows)
    for j, wanted in zip(found[1], rows, strict=True):
        assert (j.reshape(wanted.shape) - wanted).norm() <= TOLERANCE * size


def quietly(call):
    """Return what a function returns, and whether it warned that its way is slow."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, any("one backward pass for each point" in str(w.message) for w in caught)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_backward_passes(name):
    case, parameters = made(name)
    expected = one_by_one(case, parameters)
    after = surroundings(case.model)
    case, parameters = made(name)
    terms = Terms(case.model, {"a": case.residual}, None)
    finder = RowFinder(terms)
    given = terms.points_of({"a": case.points})["a"]
    found, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, given))
    assert finder.ways == {"a": case.way}
    assert warned == (case.way == "backward")
    assert_equal(found, expected)
    assert found[0].dim() == 1
    assert all(j.shape == (len(found[0]), p.numel()) for j, p in zip(found[1], parameters, strict=True))
    assert not any(x.requires_grad for x in (found[0], *found[1]))
    now = surroundings(case.model)  # of one evaluation
    assert torch.equal(now[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(now[1], after[1], strict=True))
    assert all(p.grad is None and p.requires_grad for p in parameters)


@pytest.mark.parametrize("name", CASES)
def test_every_way_after_the_first_that_serves_finds_the_same_rows(name):
    """A way before that one may be wrong; which is why rows are compared."""
    case, parameters = made(name)
    expected = one_by_one(case, parameters)
    order = list(WAYS)
    for way in order[order.index(case.way) :]:
        case, parameters = made(name)
        terms = Terms(case.model, {"a": case.residual}, None)
        finder = RowFinder(terms)
        finder.resume({"a": way})
        given = terms.points_of({"a": case.points})["a"]
        assert_equal(quietly(lambda: finder.of_term(terms.terms[0], parameters, given))[0], expected)  # noqa: B023


def test_rows_of_many_points_are_found_in_parts(monkeypatch):
    monkeypatch.setattr("tengrad_triton.residuals.rows._CHUNK_BYTES", 2000)
    for name in ("forward_laplacian", "several_outputs", "matrices", "several_inputs"):
        test_rows_are_those_of_single_backward_passes(name)


def test_a_residual_that_changes_is_found_out_at_a_power_of_two():
    """It mixes points from its third call on."""
    torch.manual_seed(0)
    u, mixes = network(), []
    terms = Terms(u, {"a": lambda x: u(x) - u(x).mean() if mixes else u(x)}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    finder.of_term(terms.terms[0], parameters, x)
    finder.of_term(terms.terms[0], parameters, x)
    assert finder.ways == {"a": "batched"}
    mixes.append(True)
    finder.of_term(terms.terms[0], parameters, x)
    _, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, x))
    assert warned
    assert finder.ways == {"a": "backward"}


def test_rows_that_are_not_finite_prove_nothing():
    torch.manual_seed(0)
    u, factor = network(), [float("nan")]
    terms = Terms(u, {"a": lambda x: (u(x) - u(x).mean()) * factor[0]}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    for _ in range(3):
        finder.of_term(terms.terms[0], parameters, x)
        assert finder.ways == {"a": "batched"}
    factor[0] = 1.0
    _, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, x))
    assert warned


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, AssertionError])
def test_errors_that_say_nothing_about_a_way_do_not_change_it(error):
    torch.manual_seed(0)
    u, raising = network(), [True]

    def residual(x):
        if raising and torch._C._functorch.maybe_current_level() is not None:
            raise error
        return u(x)

    terms = Terms(u, {"a": residual}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    with pytest.raises(error):
        finder.of_term(terms.terms[0], parameters, x)
    raising.clear()
    finder.of_term(terms.terms[0], parameters, x)
    assert finder.ways == {"a": "batched"}


def test_what_cannot_be_expanded_says_so():
    u = network()
    rows = WAYS["expanded"](u, lambda x: u(x).sum())
    with pytest.raises(NotExpandableError, match="one or more a point"):
        rows(list(u.parameters()), (points(),))
