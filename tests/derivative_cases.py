"""Networks for the tests of derivatives, and what torch.func says about them."""

import torch
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

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
