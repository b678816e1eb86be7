"""Small models from drawn descriptions. To have another layer in them, add a row to `KINDS`.

Every piece maps hidden states [N, T, WIDTH] to hidden states of the same shape.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

WIDTH, IDS, CLASSES = 3, 5, 3


@dataclass(frozen=True)
class Piece:
    """One part of a model: what it computes, in which container it stands, and what follows."""

    kind: str = "linear"
    wrap: str = "plain"
    after: str = "tanh"


@dataclass(frozen=True)
class ModelPlan:
    """A whole model. ``eval_mode`` has all norms use their running statistics."""

    pieces: tuple[Piece, ...] = (Piece(),)
    output: str = "tensor"
    tokens: int = 2
    eval_mode: bool = False


class Via(nn.Module):
    """A layer on another view of the hidden states."""

    def __init__(self, layer, before=lambda h: h, after=lambda y, h: y):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, h):
        return self.after(self.layer(self.before(h)), h)


class Called(nn.Module):
    """A function of some layers and the hidden states; the layers are called ``a`` and ``b``."""

    def __init__(self, function, a=None, b=None, tie=False):
        super().__init__()
        self.function, self.a, self.b = function, a or nn.Linear(WIDTH, WIDTH), b
        if tie:
            self.b.weight = self.a.weight

    def forward(self, h):
        return self.function(self, h)


class Own(nn.Module):
    """A module without a rule, with a matrix and a 0-dim parameter."""

    def __init__(self, scalar_only=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.matrix = None if scalar_only else nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, h):
        return h * self.scale if self.matrix is None else self.scale * (h @ self.matrix).sin() + h


class OwnTable(nn.Module):
    """A position table in a module without a rule."""

    def __init__(self, tokens):
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, WIDTH))

    def forward(self, h):
        return h + self.table


class OwnNorm(nn.BatchNorm1d):
    """A batch norm with a forward of its own, so that no rule covers it."""

    def forward(self, x):
        return super().forward(x) * 1.5


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def ids_of(h):
    return (h.detach().sum(-1) * 7).long().abs() % IDS


def channels(layer):
    return Via(layer, lambda h: h.mT, lambda y, h: y.mT)


def first_of(layer):
    return Called(lambda m, h: m.a(h)[0], layer)


def attended(m, h):
    return m.a(h, h, h)[0]


def force(m, h):
    """Minus the derivative of an energy, which is differentiated further by the loss."""
    h = h if h.requires_grad else h.detach().requires_grad_()
    energy = m.b(m.a(h).tanh()).tanh()
    return h - torch.autograd.grad(energy.sum(), h, create_graph=True)[0]


def residue(m, h):
    """An output and its second derivative, as in a physics residual."""
    x = h if h.requires_grad else h.detach().requires_grad_()
    y = m.a(x).tanh()
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return y + second


def position(tokens, used):
    def add(m, h):
        places = torch.arange(h.shape[1])
        return h + (m.a(places) if used else m.a.weight[places])

    return Called(add, nn.Embedding(tokens, WIDTH))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def symmetric():
    layer = linear()
    register_parametrization(layer, "weight", Symmetric())
    return layer


def gate(h):
    return h * h.softmax(0)


def shift(h):
    return h + 0.5 * h.roll(1, 0)


def permute(h):
    return h[torch.arange(len(h)).flip(0)] * 0.5 + h


# Each takes the number of tokens T.
KINDS = {
    "linear": lambda t: linear(),
    "linear of vectors": lambda t: Via(
        nn.Linear(t * WIDTH, t * WIDTH), lambda h: h.flatten(1), lambda y, h: y.view(h.shape)
    ),
    "linear over 2-d positions": lambda t: Via(linear(), lambda h: h[:, None], lambda y, h: y[:, 0]),
    "linear of merged samples": lambda t: Via(linear(), lambda h: h.reshape(-1, WIDTH), lambda y, h: y.view(h.shape)),
    "linear, sequence first": lambda t: Via(linear(), lambda h: h.transpose(0, 1), lambda y, h: y.transpose(0, 1)),
    "conv1d": lambda t: channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "conv1d, depthwise": lambda t: channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "conv2d": lambda t: Via(nn.Conv2d(1, 2, 3, padding=1), lambda h: h[:, None], lambda y, h: y.sum(1)),
    "embedding": lambda t: Via(nn.Embedding(IDS, WIDTH), ids_of, lambda y, h: h + y),
    "positions": lambda t: position(t, used=True),
    "positions, not called": lambda t: position(t, used=False),
    "positions of one's own": OwnTable,
    "layer norm": lambda t: nn.LayerNorm(WIDTH),
    "group norm": lambda t: channels(nn.GroupNorm(WIDTH, WIDTH)),
    "batch norm": lambda t: channels(nn.BatchNorm1d(WIDTH)),
    "batch norm, no statistics kept": lambda t: channels(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "batch norm of one's own": lambda t: channels(OwnNorm(WIDTH)),
    "prelu": lambda t: nn.PReLU(),
    "prelu by channel": lambda t: channels(nn.PReLU(WIDTH)),
    "attention": lambda t: Called(attended, nn.MultiheadAttention(WIDTH, 1, batch_first=True)),
    "attention over samples": lambda t: Called(attended, nn.MultiheadAttention(WIDTH, 1)),
    "gru": lambda t: first_of(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "lstm": lambda t: first_of(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "own": lambda t: Own(),
    "scalar": lambda t: Own(scalar_only=True),
    "own called twice": lambda t: Called(lambda m, h: m.a(m.a(h).tanh()), Own()),
    "weight norm": lambda t: weight_norm(linear()),
    "symmetric": lambda t: symmetric(),
    "linear called twice": lambda t: Called(lambda m, h: m.a(m.a(h).tanh())),
    "tied": lambda t: Called(lambda m, h: m.b(m.a(h).tanh()), b=linear(), tie=True),
    "tied to an embedding": lambda t: Called(
        lambda m, h: m.b(h + m.a(ids_of(h)))[..., :WIDTH], nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, IDS), tie=True
    ),
    "used beside its calls": lambda t: Called(lambda m, h: F.linear(m.a(h).tanh(), m.a.weight)),
    "never called": lambda t: Called(lambda m, h: F.linear(h, m.a.weight, m.a.bias)),
    "weight as output": lambda t: Called(lambda m, h: m.a(h) + m.a.weight.square().sum(0)),
    "minus the mean over samples": lambda t: Via(linear(), after=lambda y, h: y - y.mean(0)),
    "gated over samples": lambda t: Via(linear(), after=lambda y, h: gate(y)),
    "shifted samples": lambda t: Via(linear(), shift),
    "permuted samples": lambda t: Via(linear(), permute),
    "force": lambda t: Called(force, b=nn.Linear(WIDTH, 1)),
    "residue": lambda t: Called(residue),
    "nothing": lambda t: nn.Identity(),
}
DERIVING = ("force", "residue")
MIXING = ("batch norm of one's own", "minus the mean over samples", "gated over samples", "shifted samples")


def view_in_place(h):
    h[..., :1].mul_(0.5)
    return h


AFTER = {
    "nothing": lambda h: h,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu in place": torch.relu_,
    "scaled in place": lambda h: h.mul_(0.8),
    "added to in place": lambda h: h.add_(0.1),
    "a view in place": view_in_place,
    "turned twice": lambda h: h.mT.contiguous().mT,
}


class Wrapped(nn.Module):
    """A piece in a container, and what follows it."""

    def __init__(self, piece, tokens):
        super().__init__()
        self.wrap, self.after = piece.wrap, AFTER[piece.after]
        layer = KINDS[piece.kind](tokens)
        if piece.wrap == "dictionary":
            self.parts = nn.ModuleDict({"only": layer, "unused": nn.Linear(2, 2)})
        elif piece.wrap == "list":
            self.parts = nn.ModuleList([layer, nn.Tanh()])
        elif piece.wrap == "sequential":
            self.parts = nn.Sequential(nn.Tanh(), nn.Sequential(layer))
        else:
            self.parts = layer
        self.join = nn.Linear(2 * WIDTH, WIDTH) if piece.wrap == "concatenated" else None
        self.is_on = True

    def forward(self, h):
        if self.wrap == "in some forwards" and not self.is_on:
            return h
        return self.after(self.inner(h))

    def inner(self, h):
        if self.wrap == "dictionary":
            return self.parts["only"](h)
        if self.wrap == "list":
            for part in self.parts:
                h = part(h)
            return h
        if self.wrap == "checkpoint":
            return checkpoint(self.parts, h, use_reentrant=False)
        if self.wrap == "residual":
            return h + self.parts(h)
        if self.wrap == "concatenated":
            return self.join(torch.cat([h, self.parts(h)], -1))
        return self.parts(h)


WRAPS = (
    "plain", "sequential", "list", "dictionary", "residual", "concatenated", "checkpoint", "in some forwards"
)  # fmt: skip
OUTPUTS = ("tensor", "dictionary", "first of two", "sum of two", "beside a scalar", "tokens' mean")


class RandomModel(nn.Module):
    """The model of a plan: [N, T, WIDTH] to logits [N, CLASSES], and what else ``plan.output`` says."""

    def __init__(self, plan):
        super().__init__()
        self.plan, self.forwards = plan, 0
        self.pieces = nn.ModuleList(Wrapped(piece, plan.tokens) for piece in plan.pieces)
        entries = WIDTH if plan.output == "tokens' mean" else plan.tokens * WIDTH
        self.head = nn.Linear(entries, CLASSES)
        self.second = nn.Linear(entries, CLASSES) if plan.output in ("first of two", "sum of two") else None

    def forward(self, x):
        self.forwards += 1
        h = x
        for piece in self.pieces:
            piece.is_on = self.forwards % 2 == 1
            h = piece(h)
        h = h.mean(1) if self.plan.output == "tokens' mean" else h.flatten(1)
        logits = self.head(h)
        if self.plan.output == "dictionary":
            return {"hidden": h, "logits": logits}
        if self.plan.output == "beside a scalar":
            return h.square().mean(), logits
        return (logits, self.second(h)) if self.second is not None else logits
