"""The layers that `test_sharded_layers.py` trains after `fully_shard`: those of `exact_cases`, and some more."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from distributed_cases import whole
from exact_cases import LAYERS, SAMPLES, Case, Flat, batches
from layer_cases import Tied
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import PerSampleGrads, TENGraD, canonical


class Squared(nn.Module):
    """A linear layer of the squares of its weights, whose rule reads them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(x, self.weight.square())


@canonical.register
def _(layer: Squared, x, grad_y):
    return {"weight": PerSampleGrads(2 * layer.weight.detach() * torch.einsum("no,ni->noi", grad_y, x))}


class TiedInOneGroup(Tied):
    """Two layers with one weight, which are one group of `fully_shard`."""


class Nested(nn.Module):
    """Blocks within blocks, one of which is called twice, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)))
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.block(x) * self.scale))


CASES = {
    **LAYERS,
    "linear with one output": Case(lambda: Flat(nn.Linear(4, 1)), (4,)),
    "linear with one output over tokens, called twice": Case(
        lambda: Flat(nn.Linear(4, 1), call=lambda layer, x: layer(x) + layer(x.flip(1).tanh())), (6, 4)
    ),
    "conv with one output": Case(lambda: Flat(nn.Conv2d(2, 1, 3, padding=1)), (2, 5, 4)),
    "a user's rule that reads the weight": Case(lambda: Flat(Squared()), (4,)),
    "tied linear layers in one group": Case(TiedInOneGroup, (4,)),
    "blocks within blocks": Case(Nested, (4,)),
}

# One or two of each kind, which take a second each.
SOME = [
    *("linear", "linear without bias", "linear over tokens called twice", "linear with one output", "conv"),
    *("conv, reflect", "conv, groups", "conv, depthwise", "conv called twice, other sizes", "bilinear"),
    *("conv1d, every option", "conv3d, every option", "transposed conv2d, every option", "embedding, padding"),
    *("embedding bag, mean, padding", "embedding bag, max", "layer norm over tokens", "rms norm", "group norm"),
    *("instance norm", "batch norm in evaluation", "batch norm, batch statistics", "prelu", "attention"),
    *("attention, separate projections", "lstm, projected, without biases", "gru", "positions, as many as samples"),
    *("tied linear layers", "tied linear layers in one group", "tied embedding and head", "weight norm"),
    *("a weight used outside of its layer", "parameters of the model's own", "a user's rule that reads the weight"),
    *("linear with one output over tokens, called twice", "blocks within blocks", "spectral norm"),
]
# `fully_shard` of the layer itself does not serve these: something else uses its parameters.
WITHIN_THE_MODEL = {
    *("positions, as many as samples, not called", "tied linear layers", "tied embedding and head"),
    *("a weight used outside of its layer", "a layer that is never called"),
}


def depends_on_parts(name):
    """Whether the rows depend on what else is in a process's part of the batch, so that DDP is what to compare with.

    Statistics do. So does what the first dimension of an input is, if it is as long as the others. Bags are padded to
    the largest one of their part, which D sees.
    """
    return "batch statistics" in name or name in {
        "encoder layer, as many tokens as samples",
        "embedding bag, bags of several sizes",
    }


def made(name, state=None):
    """Return a new model, with the given state."""
    torch.manual_seed(0)
    model = copy.deepcopy(CASES[name].model()).double()
    if state is not None:
        model.load_state_dict(state)
    return model


def by_layers(model, name):
    """Return a model whose layers `fully_shard` is called for, wherever it can be."""
    if isinstance(model, TiedInOneGroup):
        fully_shard([model.first, model.second])
    elif name not in WITHIN_THE_MODEL:
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
    return fully_shard(model)


def as_a_whole(model, name):
    """Return a model for which `fully_shard` is called once."""
    return fully_shard(model)


def replicated(model, name):
    """Return a model that each process has."""
    return DistributedDataParallel(model)


def trained(name, state, wrap, rank=0, count=1, steps=10, **options):
    """Return the parameters after some steps with this rank's part of each batch."""
    model = made(name, state)
    called = wrap(model, name)
    settings = {"lr": 0.03, "refresh_every": 4, "fisher": "exact", "seed": 0, **options}
    optimizer = TENGraD(called, **settings)
    for inputs, labels in batches(CASES[name], steps):
        x, y = (part.tensor_split(count)[rank] for part in (inputs, labels))
        optimizer.zero_grad()
        (F.cross_entropy(called(x), y, reduction="sum") * count / SAMPLES).backward()
        optimizer.step()
    return torch.cat([whole(p).flatten() for p in model.parameters()])
