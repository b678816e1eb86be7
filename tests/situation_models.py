"""Small models and loops as people write them, for the situations of `situations.py`."""

import dataclasses
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def batches(count=2, shape=(4,), samples=5, classes=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(samples, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (samples,), generator=generator),
        )
        for _ in range(count)
    ]


def mlp(width=5):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


class Calls(nn.Module):
    """Parts, and a function of them and the input that is the forward."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def derivative_of(u, x):
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def residual(model, x):
    """u' + u of a one-dimensional problem."""
    z = x.detach().requires_grad_(True)
    u = model.net(z)
    return derivative_of(u, z) + u


def forces(model, x):
    """The negative gradient of an energy."""
    z = x.detach().requires_grad_(True)
    return -derivative_of(model.net(z), z)


def laplacian(model, x):
    z = x.detach().requires_grad_(True)
    first = derivative_of(model.net(z), z)
    return sum(derivative_of(first[:, k], z)[:, k : k + 1] for k in range(z.shape[1]))


def by_func(model, x):
    return torch.func.vmap(torch.func.grad(lambda point: model.net(point[None]).sum()))(x)


def field(inputs, norm=False):
    """A network from ``inputs`` numbers to one."""
    middle = [nn.LayerNorm(6)] if norm else []
    return nn.Sequential(nn.Linear(inputs, 6), *middle, nn.Tanh(), nn.Linear(6, 1))


@dataclasses.dataclass
class Result:
    loss: object
    logits: object


class Named(OrderedDict):
    """A dictionary that pytrees do not know."""


class Plain:
    """An object that no library knows."""

    def __init__(self, prediction):
        self.prediction = prediction


def two_heads(norm):
    def function(model, x):
        h = torch.tanh(model.norm(model.body(x)))
        return model.a(h), model.b(h)

    return Calls(function, body=nn.Linear(4, 6), norm=norm, a=nn.Linear(6, 3), b=nn.Linear(6, 2))


def checkpointed(norm):
    def function(model, x):
        return model.head(checkpoint(model.block, model.stem(x), use_reentrant=False))

    block = nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh())
    return Calls(function, stem=nn.Linear(4, 6), block=block, head=nn.Linear(6, 3))


class NormAct(nn.BatchNorm1d):
    """A batch norm with an activation, as image models have it."""

    def forward(self, x):
        return super().forward(x).relu()


class Gate(nn.Module):
    """Stores a part of the loss, and features, as attributes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4) / 2)
        self.penalty, self.seen = None, []

    def forward(self, x):
        p = (x @ self.w).softmax(-1)
        self.penalty = p.mean(0).square().sum()
        self.seen.append(p.detach())
        return x * p


class Mixing(nn.Module):
    """Mixes hidden features of samples with weight ``share``, which may be zero at first."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.how, self.share = how, 0.0

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + self.share * self.how(h))


def pooled(model, x):
    """One output for each two inputs, as for graphs of two nodes."""
    return model.head(model.net(x).unflatten(0, (-1, 2)).tanh().mean(1))


def contrasted(model, x):
    """The similarities [N, N] of two views of each sample, as contrastive losses take them."""
    first, second = (F.normalize(part(x[:, k]), dim=-1) for k, part in enumerate((model.a, model.b)))
    return model.scale.exp() * first @ second.T


def mse(output, _):
    return (output - 1.0).square().mean()


def of_heads(output, y):
    return F.cross_entropy(output[0], y) + 0.5 * output[1].square().mean()
