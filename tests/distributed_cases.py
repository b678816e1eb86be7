"""What trains in several processes, and beside it in one: models, batches, options, and how each rank gets its part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import LevenbergMarquardt, TENGraD
from tengrad_triton.likelihoods import Categorical

CLASSES, SAMPLES, STEPS = 3, 16, 20
EMPTY_RANK = "the first rank has no samples"


class FixedLabels(Categorical):
    """Draws labels that depend on the output only, so that they are the same however samples are distributed."""

    def sample(self, output, generator):
        return (output + 2 * (1e3 * output).sin()).argmax(1)


class Transformer(nn.Module):
    """A language model of one layer, whose last layer shares the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)).mean(1))[:, :CLASSES]


class WithPositions(Transformer):
    """Adds to the words vectors of their positions, which have no entry for each sample."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 8))

    def forward(self, ids):
        return self.head(self.block(self.embed(ids) + self.positions).mean(1))[:, :CLASSES]


class TwoHeads(nn.Module):
    """The sign of a sample's first entry decides which of two heads it takes; a head without samples is not called."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleList(nn.Linear(5, CLASSES) for _ in range(2))

    def forward(self, x):
        hidden, taken = self.body(x).tanh(), [x[:, :1] > 0, x[:, :1] <= 0]
        return sum(mask * head(hidden) for head, mask in zip(self.heads, taken, strict=True) if mask.any())


def mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def conv_net():
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.Tanh()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, CLASSES))
    model[1].running_mean.uniform_(-0.3, 0.3)
    model[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


def vectors(generator):
    return torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)


def images(generator):
    return torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)


def positive_first(generator):
    """Return vectors whose first entries are positive in the first half of the batch, and negative in the other."""
    x = vectors(generator)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, -1.0]).repeat_interleave(SAMPLES // 2)
    return x


def sentences(generator):
    return torch.randint(11, (SAMPLES, 5), generator=generator)


@dataclass(frozen=True)
class Case:
    """A training in several processes that is to be that of one with the whole batch.

    Attributes:
        model: makes the model, from torch's present seed.
        inputs: draws the inputs of a batch.
        options: of the optimizer, beside the model.
        wrapper: of `DistributedDataParallel`; None for gradients that the loop averages itself.
        parts: micro-batches of each rank, all but the last of them within ``no_sync()``.
        shares: the relative sizes of the ranks' parts, repeated as often as there are ranks.
        closure: whether the step takes a closure.
        sharded: of `fully_shard`, in place of the wrapper; None for whole parameters.
    """

    model: Callable[[], nn.Module] = mlp
    inputs: Callable[[torch.Generator], torch.Tensor] = vectors
    options: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Mapping[str, Any] | None = field(default_factory=dict)
    parts: int = 1
    shares: tuple[int, ...] = (1,)
    closure: bool = False
    sharded: Mapping[str, Any] | None = None


def of(fisher="sampled", **options):
    likelihood = FixedLabels() if fisher == "sampled" else "categorical"
    return {"lr": 0.03, "refresh_every": 3, "fisher": fisher, "likelihood": likelihood, "seed": 0, **options}


def fails_after_its_first_step(rank):
    """Return a schedule of the damping that raises on all ranks but the first."""

    def damping(step):
        if rank and step:
            raise ArithmeticError("no damping here")
        return 1.0

    return damping


UNEVEN = (1, 3)
CASES = {
    "MLP": Case(options=of()),
    "convolutions, batch norm in evaluation": Case(conv_net, images, of()),
    "transformer, tied weights": Case(Transformer, sentences, of()),
    "MLP, exact": Case(options=of("exact")),
    "convolutions, exact": Case(conv_net, images, of("exact")),
    "transformer, exact": Case(Transformer, sentences, of("exact"), shares=UNEVEN),
    "MLP, empirical": Case(options=of("empirical")),
    "convolutions, empirical, uneven": Case(conv_net, images, of("empirical"), shares=UNEVEN),
    "transformer, empirical": Case(Transformer, sentences, of("empirical")),
    "uneven": Case(conv_net, images, of(), shares=UNEVEN),
    EMPTY_RANK: Case(options=of("empirical"), shares=(0, 2)),
    "three labels": Case(options=of(fisher_samples=3), shares=UNEVEN),
    "diagonal D": Case(conv_net, images, of(scaling="diagonal")),
    "no D, trust region": Case(conv_net, images, of(scaling="none", damping=0.1, trust_region=1e-3)),
    "relative damping": Case(options=of(scaling="none", damping=0.1, relative_damping=True)),
    "SPRING": Case(options=of(scaling="none", damping=0.1, spring=0.9, momentum=0.0)),
    "adapted damping": Case(options=of(scaling="none", damping=LevenbergMarquardt(0.1)), closure=True),
    "history": Case(options=of(history=2), shares=UNEVEN),
    "the network as one block": Case(Transformer, sentences, of(blocks="network")),
    "some rows": Case(conv_net, images, of(fisher_rows=7)),
    "some exact rows": Case(options=of("exact", fisher_rows=11, history=2, blocks="network"), shares=UNEVEN),
    "compressed": Case(options=of(representation="compressed", tol=1e-9)),
    "factored": Case(conv_net, images, of(representation="factored"), shares=UNEVEN),
    "rows by torch.func": Case(lambda: nn.Sequential(nn.Linear(6, 7), Gate(), nn.Linear(7, CLASSES)), options=of()),
    "a table looked up once for the batch": Case(WithPositions, sentences, of("exact"), shares=UNEVEN),
    "accumulation": Case(options=of("empirical"), parts=2, shares=UNEVEN),
    "accumulation, labels": Case(conv_net, images, of(), parts=2),
    "static graph": Case(conv_net, images, of("empirical"), {"static_graph": True}),
    "static graph, labels": Case(options=of(), wrapper={"static_graph": True}),
    "gradients as views of buckets": Case(options=of(momentum=0.0), wrapper={"gradient_as_bucket_view": True}),
    "unused parameters": Case(
        TwoHeads, positive_first, of(scaling="none", damping=0.1), {"find_unused_parameters": True}
    ),
    "averaged by the loop": Case(options=of(), wrapper=None),
}


class Gate(nn.Module):
    """An elementwise scale, for which there is no rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7))

    def forward(self, x):
        return x * self.scale


def made(case):
    torch.manual_seed(0)
    return case.model().double()


def batch(case, step):
    generator = torch.Generator().manual_seed(step)
    return case.inputs(generator), torch.randint(CLASSES, (SAMPLES,), generator=generator)


def bounds(case, count):
    """Return where each rank's part of a batch begins, and the end of the last one."""
    shares = [case.shares[rank % len(case.shares)] for rank in range(count)]
    return [SAMPLES * sum(shares[:rank]) // sum(shares) for rank in range(count + 1)]


def sharded(model, mesh=None, **settings):
    """Return a model of which each process has a part: that of its layers, and of what is left."""
    tied = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Sequential, nn.ModuleList))]
    for child in model.children():
        if child not in tied and child is not getattr(model, "head", None) and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    if isinstance(model, TwoHeads):  # its gradients are wrong otherwise
        model.set_reduce_scatter_unused_params(True)
    return model


def wrapped(case, count, model=None):
    """Return the case's model, or one like it, as the loop calls it in one of ``count`` processes."""
    model = model or made(case)
    if count > 1 and case.sharded is not None:
        return sharded(model, **case.sharded)
    return DistributedDataParallel(model, **case.wrapper) if count > 1 and case.wrapper is not None else model


def trained(case, rank=0, count=1, steps=STEPS, called=None, optimizer=None, first=0):
    """Return all parameters after some steps in this process, which has its rank's part of each batch."""
    called = called or wrapped(case, count)
    optimizer = optimizer or TENGraD(called, **case.options)
    begin, end = bounds(case, count)[rank : rank + 2] if count > 1 else (0, SAMPLES)
    for step in range(first, first + steps):
        x, y = (part[begin:end] for part in batch(case, step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            return backward(case, called, x, y, count)

        if case.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return torch.cat([whole(p).flatten() for p in called.parameters()])


def whole(parameter):
    """Return all entries of a parameter, of which this process may have a part."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def backward(case, called, x, y, count):
    """Accumulate the gradient of a loss whose mean over the ranks is the mean over all samples; return the loss."""
    loss, parts = 0.0, list(zip(x.tensor_split(case.parts), y.tensor_split(case.parts), strict=True))
    for place, (inputs, labels) in enumerate(parts):
        is_last = place == len(parts) - 1
        if count > 1 and case.sharded is not None:
            called.set_requires_gradient_sync(is_last)
        has_no_sync = count > 1 and case.wrapper is not None and case.sharded is None
        no_sync = called.no_sync() if has_no_sync and not is_last else contextlib.nullcontext()
        with no_sync:
            own = F.cross_entropy(called(inputs), labels, reduction="sum") * count / SAMPLES
            own.backward()
        loss = loss + own.detach()
    if count > 1 and case.wrapper is None:
        for parameter in called.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= count
    return loss
