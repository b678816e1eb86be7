"""Residual functions of many kinds, each with a model, its points, and the way by which its rows are found."""

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parametrizations

from tengrad_triton import derivatives, laplacian

N = 7
COLUMNS = torch.tensor([1.0, 2.0, 3.0]).double()


class Case(NamedTuple):
    """A model, its residual function, the way that serves it, and its points."""

    model: nn.Module
    residual: object
    way: str
    points: tuple


def network(outputs=1, width=6):
    layers = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers).double()


def points(*shape):
    return torch.rand(N, *(shape or (2,)), dtype=torch.float64)


def slope(function, x):
    """Return the derivative of the sum of a function's values by its points, with autograd."""
    return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]


def burgers(u, x):
    d = derivatives(u, x)
    return d.first[:, 0] + d.value * d.first[:, 1] - 0.1 * d.second[:, 1]


def by_torch_func(u, x):
    value = lambda point: u(point[None])[0, 0]  # noqa: E731
    return vmap(hessian(value))(x).diagonal(dim1=1, dim2=2).sum(1) + vmap(jacrev(value))(x)[:, 0]


def by_autograd(u, x):
    first = slope(u, x.requires_grad_())
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return second[:, 0] + u(x)[:, 0] * first[:, 1]


def joined(u, x):
    left, right = u(torch.cat([x, -x])).chunk(2)
    return left - right.square()


def masked(u, x):
    inside = x[:, 0] > 0.5
    r = u(x)[:, 0].clone()
    r[inside] = u(x[inside])[:, 0] * 3
    return r


class Cube(torch.autograd.Function):
    """A function without a rule for `torch.func`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


OF_A_NETWORK = {
    "no derivatives": ("by layer", lambda u, x: u(x)[:, 0] ** 2 - x[:, 0]),
    "laplacian": ("by layer", lambda u, x: laplacian(u, x) + x.sin().sum(1, keepdim=True)),
    "burgers": ("by layer", burgers),
    "torch.func": ("batched", by_torch_func),
    "autograd": ("expanded", by_autograd),
    "autograd, several residuals": ("expanded", lambda u, x: slope(u, x.clone().requires_grad_())),
    "the module called by name": ("by layer", lambda u, x: functional_call(u, dict(u.named_parameters()), x)),
    "two batches": ("by layer", lambda u, x: u(x) - u(x.flip(1)) * u(torch.zeros_like(x))),
    "two batches in one": ("batched", joined),
    "two batches in one, autograd": ("expanded", lambda u, x: slope(lambda x: joined(u, x), x.requires_grad_())),
    "squeezed": ("by layer", lambda u, x: u(x).squeeze()),
    "the number of points": ("by layer", lambda u, x: u(x) * len(x)),
    "the mean of the points": ("by layer", lambda u, x: u(x - x.mean(0))),
    "the mean of the outputs": ("backward", lambda u, x: u(x) - u(x).mean()),
    "the points of neighbours": ("by layer", lambda u, x: u(x) - u(x.roll(1, 0))),
    "the outputs of neighbours": ("backward", lambda u, x: u(x) - u(x).roll(1, 0)),
    "a choice of points": ("backward", masked),
    "noise": ("by layer", lambda u, x: u(x + torch.randn_like(x))),
    "an own function": ("by layer", lambda u, x: Cube.apply(u(x))),
    "an own function of parameters": ("backward", lambda u, x: u(x) * Cube.apply(u[0].weight).sum()),
}
OF_SEVERAL_OUTPUTS = {
    "several outputs": ("by layer", lambda u, x: u(x) * COLUMNS),
    "matrices": ("by layer", lambda u, x: torch.stack([u(x), u(x + 1).sin()], 1)),
}


def points_that_require_a_gradient():
    u = network()
    return Case(u, lambda x: slope(u, x), "expanded", (points().requires_grad_(),))


def several_inputs():
    u = network()
    return Case(u, lambda x, y: u(x)[:, 0] - u(x + 1)[:, 0] - y, "by layer", (points(), torch.rand(N).double()))


def whole_numbers():
    u = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Case(u, lambda i, y: u(i)[:, 0] - y, "batched", (torch.arange(N) % 5, torch.rand(N).double()))


def module():
    u = network()
    return Case(u, u, "by layer", (points(),))


def other_points_beside():
    u, others = network(), points()
    return Case(u, lambda x: u(x) - u(others).mean() * x[:, :1], "batched", (points(),))


class Tied(nn.Module):
    """Uses one matrix twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def tied():
    u = Tied().double()
    return Case(u, lambda x: laplacian(u, x)[:, 0], "batched", (points(3),))


def tied_by_autograd():
    u = Tied().double()
    return Case(u, lambda x: slope(u, x.requires_grad_())[:, 0], "expanded", (points(3),))


def parametrized():
    u = network()
    parametrizations.weight_norm(u[0])
    parametrizations.orthogonal(u[2])
    return Case(u, u, "batched", (points(),))


def parametrized_by_autograd():
    u = parametrized().model
    return Case(u, lambda x: slope(u, x.requires_grad_())[:, 0], "expanded", (points(),))


def spectral_norm():
    u = network()
    parametrizations.spectral_norm(u[2])
    return Case(u, u, "batched", (points(),))


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


def captured_coefficient():
    model = Inverse()
    nu = model.nu  # torch.func does not replace what a closure holds
    return Case(model, lambda x: nu * laplacian(model.u, x) - model.u(x), "captured", (points(),))


def captured_weight():
    u = network()
    w = u[0].weight
    residual = lambda x: (u(x) - (x @ w.T).sum(1, keepdim=True)) * w.square().sum()  # noqa: E731
    return Case(u, residual, "captured", (points(),))


def normalized(way="backward"):
    u = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Case(u, u, way, (points(),))


def normalized_in_eval():
    case = normalized("batched")
    case.model(points())
    case.model.eval()
    return case


def dropout():
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    return Case(u, u, "by layer", (points(),))


def cancelling():
    """The residual does not depend on the shift, but its derivative by it is rounding errors."""
    u = network(outputs=3)
    u.register_parameter("shift", nn.Parameter(torch.tensor(0.7).double()))
    return Case(u, lambda x: (u(x).exp() * 3 + u.shift).softmax(1)[:, 0], "batched", (points(),))


class Counted(nn.Module):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self):
        super().__init__()
        self.u = network()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.u(x) * self.calls.sin()


def counted():
    model = Counted()
    return Case(model, model, "by layer", (points(),))


def of(table, outputs):
    """Return what makes the case of each function of a network and its points."""

    def make(way, function):
        u = network(outputs)
        return Case(u, lambda x: function(u, x), way, (points(),))

    return {name: (lambda row=row: make(*row)) for name, row in table.items()}


MAKERS = [
    *(points_that_require_a_gradient, several_inputs, whole_numbers, module, other_points_beside, tied),
    *(tied_by_autograd, parametrized, parametrized_by_autograd, spectral_norm, frozen, coefficient),
    *(captured_coefficient, captured_weight, normalized, normalized_in_eval, dropout, cancelling, counted),
]
CASES = of(OF_A_NETWORK, 1) | of(OF_SEVERAL_OUTPUTS, 3) | {make.__name__.replace("_", " "): make for make in MAKERS}
