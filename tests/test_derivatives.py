"""Derivatives with respect to the inputs are those of torch.func, for every module and under every transform."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, weight_norm

from tengrad_triton import derivatives, laplacian
from tengrad_triton.derivatives import Jet, register, register_activation, through
from tengrad_triton.derivatives.activations import ACTIVATIONS
from tengrad_triton.derivatives.rules import RULES

N, D, WIDTH, O = 5, 3, 8, 2  # noqa: E741


class Sine(nn.Module):
    def forward(self, z):
        return z.sin()


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Strange(nn.Module):
    """Mixes features, and multiplies."""

    def forward(self, x):
        return x + x.sin() * x.mean(-1, keepdim=True)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x.square())


class LoudTanh(nn.Tanh):
    def forward(self, x):
        return 3 * super().forward(x)


class PlainNorm(nn.Module):
    """Layer normalization from sums and products, as a reference."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Radius(nn.Module):
    """A distance as one more feature, by each of torch's names for it."""

    def forward(self, x):
        radii = [x.norm(dim=1, keepdim=True), torch.norm(x, 2, 1, True), torch.linalg.vector_norm(x, dim=1)[:, None]]
        return torch.cat([x[:, : WIDTH - 3], *radii], 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return x + self.inner(x, x, x)[0] + self.inner(x, x, x, need_weights=False)[0]


class PlainRadius(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, : WIDTH - 3], *[x.square().sum(1, keepdim=True).sqrt()] * 3], 1)


class Mine(nn.Module):
    """A forward of its own, with a boundary condition built in."""

    def __init__(self):
        super().__init__()
        self.net = mlp(nn.Tanh())

    def forward(self, x):
        return self.net(x) * (1 - x.square()).prod(1, keepdim=True)


def mlp(*between):
    return nn.Sequential(
        nn.Linear(D, WIDTH), *between, nn.Sequential(nn.Linear(WIDTH, WIDTH), *between), nn.Linear(WIDTH, O)
    )


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", batch_first=True)


def hooked():
    layer = nn.Tanh()
    layer.register_forward_hook(lambda module, inputs, output: output.square())
    return mlp(layer)


def own_forward_of_an_object():
    layer = nn.Tanh()
    layer.forward = torch.sin
    return mlp(layer)


NETWORKS = {
    "linear": lambda: nn.Linear(D, O),
    "no bias": lambda: nn.Sequential(nn.Linear(D, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, O, bias=False)),
    "tanh": lambda: mlp(nn.Tanh()),
    "sigmoid": lambda: mlp(nn.Sigmoid()),
    "silu": lambda: mlp(nn.SiLU()),
    "gelu": lambda: mlp(nn.GELU()),
    "gelu by tanh": lambda: mlp(nn.GELU("tanh")),
    "softplus, on both sides of its threshold": lambda: mlp(nn.Softplus(2.0, 1.0)),
    "relu": lambda: mlp(nn.ReLU()),
    "leaky relu": lambda: mlp(nn.LeakyReLU(0.1)),
    "elu": lambda: mlp(nn.ELU(0.7)),
    "identity": lambda: mlp(nn.Identity(), nn.Tanh()),
    "activation first": lambda: nn.Sequential(nn.Tanh(), nn.Linear(D, O), nn.Tanh()),
    "activation without a rule": lambda: mlp(nn.Mish()),
    "gated": lambda: nn.Sequential(nn.Linear(D, WIDTH), nn.GLU(), nn.Linear(WIDTH // 2, O)),
    "sine without a rule": lambda: mlp(Sine()),
    "strange": lambda: mlp(nn.Tanh(), Strange()),
    "strange first": lambda: nn.Sequential(Strange(), nn.Linear(D, WIDTH), nn.Tanh(), nn.Linear(WIDTH, O)),
    "residual": lambda: mlp(Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))),
    "attention": lambda: mlp(nn.Unflatten(1, (2, 4)), Attention(), nn.Flatten()),
    "transformer": lambda: mlp(nn.Unflatten(1, (2, 4)), transformer(), nn.Flatten()).eval(),
    "layer norm": lambda: mlp(nn.LayerNorm(WIDTH), nn.Tanh()),
    "radius": lambda: mlp(Radius(), nn.Tanh()),
    "flatten": lambda: mlp(nn.Unflatten(1, (2, 4)), nn.Tanh(), nn.Flatten()),
    "flatten, from the end": lambda: mlp(nn.Unflatten(-1, (2, 4)), nn.Tanh(), nn.Flatten(-2)),
    "linear over tokens": lambda: mlp(nn.Unflatten(1, (2, 4)), nn.Linear(4, 4), nn.Tanh(), nn.Flatten()),
    "convolution": lambda: mlp(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Flatten()),
    "no dropout in evaluation": lambda: mlp(nn.Dropout(0.5), nn.Tanh()).eval(),
    "batch norm in evaluation": lambda: mlp(nn.BatchNorm1d(WIDTH), nn.Tanh()).eval(),
    "subclass of linear": lambda: mlp(DoubledLinear(WIDTH, WIDTH), nn.Tanh()),
    "subclass of tanh": lambda: mlp(LoudTanh()),
    "forward hook": hooked,
    "forward of the object": own_forward_of_an_object,
    "parametrized": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(D, WIDTH)), nn.Tanh(), nn.Linear(8, O)),
    "parametrized subclass": lambda: mlp(parametrizations.spectral_norm(DoubledLinear(WIDTH, WIDTH)), nn.Tanh()).eval(),
    "own forward": Mine,
}  # fmt: skip


def points(dtype=torch.float64):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double().requires_grad_()


def reference(u, x):
    """Return value, first [N, D, O] and second [N, D, O], one point at a time."""

    def at(x_D):
        return u(x_D[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels of attention have no second derivatives
        return u(x), vmap(jacrev(at))(x).mT, vmap(hessian(at))(x).diagonal(dim1=2, dim2=3).mT


def assert_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        assert (result - wanted).abs().max() <= 1e-12 * wanted.abs().max().clamp(min=1e-3)


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


@pytest.mark.parametrize("name", ["tanh", "gelu by tanh", "elu", "strange", "residual", "own forward", "parametrized"])
def test_they_can_be_differentiated_further(name):
    u, x = network(name), points().requires_grad_()
    places = [x, *u.parameters()]

    def gradients(lap):
        loss = (lap.square().sum(1) * x[:, 0]).sum()
        once = torch.autograd.grad(loss, places, create_graph=True, materialize_grads=True)
        return *once, *torch.autograd.grad(sum(g.square().sum() for g in once), places, materialize_grads=True)

    assert_same(gradients(laplacian(u, x)), gradients(reference(u, x)[2].sum(1)))


@pytest.mark.parametrize("name", ["tanh", "silu", "strange", "own forward"])
def test_rows_of_single_points_are_those_of_the_batch(name):
    u, x = network(name), points()
    parameters = {key: p.detach() for key, p in u.named_parameters()}

    def at(parameters, x_ND, lap):
        def function(x):
            return functional_call(u, parameters, (x,))

        return lap(function, x_ND)

    class Equation(nn.Module):  # functional_call around the laplacian of a module
        def __init__(self):
            super().__init__()
            self.u = u

        def forward(self, x):
            return laplacian(self.u, x)

    def swapped(parameters, x_D):
        return functional_call(Equation(), {f"u.{key}": p for key, p in parameters.items()}, (x_D[None],)).sum()

    expected = jacrev(at)(parameters, x, lambda f, x: reference(f, x)[2].sum((1, 2)))
    closed = vmap(grad(lambda p, x_D: at(p, x_D[None], laplacian).sum()), (None, 0))(parameters, x)
    swapped_rows = vmap(grad(swapped), (None, 0))(parameters, x)
    batch = jacrev(at)(parameters, x, lambda f, x: laplacian(f, x).sum(1))
    for rows in (closed, swapped_rows, batch):
        assert_same([rows[key] for key in expected], expected.values())


def test_many_networks_at_once():
    u, x = network("tanh"), points()
    many = {key: torch.stack([p, 2 * p, -p]).detach() for key, p in u.named_parameters()}

    def lap(parameters):
        return laplacian(lambda x: functional_call(u, parameters, (x,)), x)

    each = [lap({key: p[i] for key, p in many.items()}) for i in range(3)]
    assert_same(vmap(lap)(many), each)


def test_single_precision():
    u, x = network("tanh"), points()
    expected = laplacian(u, x)
    result = laplacian(u.float(), x.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


COMPILED = {
    "eager": ["tanh", "gelu", "strange", "residual", "own forward", "layer norm"],
    "inductor": ["tanh", "gelu", "strange"],  # inductor itself fails on nested forward mode through linear layers
}
CASES = [
    pytest.param(backend, name, marks=[pytest.mark.slow] if backend == "inductor" else [])
    for backend, names in COMPILED.items()
    for name in names
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize(("backend", "name"), CASES)
def test_they_are_compiled_as_one_graph(backend, name):
    u, x = network(name), points()

    def loss(x):
        d = derivatives(u, x)
        return (laplacian(u, x) + d.value * d.first[:, 0] + d.second[:, 1]).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    places = list(u.parameters())
    results = [(f(x), *torch.autograd.grad(f(x), places)) for f in (compiled, loss)]
    assert_same(*results)


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
