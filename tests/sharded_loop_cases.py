"""Loops as people write them around a model of `fully_shard`: each returns the model after its steps.

In one process each is the plain loop, with the whole batch and whole parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from distributed_cases import CLASSES, SAMPLES, Case, batch, made, of, sharded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tengrad_triton import LevenbergMarquardt, TENGraD

STEPS = 10
MLP = Case()
OPTIONS = of("exact")  # whose rows do not depend on how samples are distributed


class Blocks(nn.Module):
    """Two residual blocks, which may be computed again in the backward."""

    def __init__(self, checkpoints=False):
        super().__init__()
        self.checkpoints = checkpoints
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 6)) for _ in range(2)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x))
        return self.head(x)


def by_blocks(model, **settings):
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def in_one_group(model):
    fully_shard([model[0], model[2]])
    return fully_shard(model)


def wrapped(model, count, wrap=sharded, **settings):
    return wrap(model, **settings) if count > 1 else model


def part_of(step, rank, count):
    n = SAMPLES // count
    return tuple(x[rank * n : rank * n + n] for x in batch(MLP, step))


def steps(called, optimizer, rank, count, before=None, between=None, after=None, loss=None):
    """Train; the functions are called before each forward, before its backward, and before the step."""
    for step in range(STEPS):
        if before is not None:
            before(step)
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        value = F.cross_entropy(called(x), y) if loss is None else loss(x, y)
        if between is not None:
            between(step)
        value.backward()
        if after is not None:
            after(step)
        optimizer.step()


def plain(model=lambda count: made(MLP), wrap=sharded, groups=None, beside=lambda called, optimizer: {}, **options):
    """Return a loop of plain steps.

    ``groups`` are made of the wrapped model, and ``beside`` returns what `steps` calls beside them.
    """

    def loop(rank, count):
        called = wrapped(model(count), count, wrap)
        optimizer = TENGraD(called, groups and groups(called), **{**OPTIONS, **options})
        steps(called, optimizer, rank, count, **beside(called, optimizer))
        return called

    return loop


def blocks(checkpoints=False):
    return made(Case(lambda: Blocks(checkpoints)))


def wrapped_in_checkpoints(count):
    model = blocks()
    for place, block in enumerate(model.blocks if count > 1 else ()):
        model.blocks[place] = checkpoint_wrapper(block)
    return model


def with_frozen_layers(count):
    model = blocks()
    model.blocks[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


def compiled_layers(count):
    model = made(MLP)
    for layer in model if count > 1 else ():
        layer.compile(backend="aot_eager")
    return model


def two_groups(called):
    return [
        {"params": list(called[0].parameters()), "lr": 0.01, "damping": 0.2, "momentum": 0.5},
        {"params": list(called[2].parameters()), "weight_decay": 0.1},
    ]


def weights_and_biases(called):
    named = list(called.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith(kind)], "weight_decay": decay}
        for kind, decay in (("weight", 0.1), ("bias", 0.0))
    ]


def adds_a_group(called, optimizer):
    def add(step):
        if step == 4:
            optimizer.add_param_group({"params": list(called[0].parameters()), "lr": 0.01})

    return {"before": add}


def freezes(called, optimizer):
    return {"before": lambda step: called[0].requires_grad_(step < 2 or step > 4)}


def clips(called, optimizer):
    return {"after": lambda step: nn.utils.clip_grad_norm_(called.parameters(), 0.1)}


def schedules(called, optimizer):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS + 1, cycle_momentum=False)
    return {"before": lambda step: scheduler.step() if step else None}


def evaluates(*places):
    def beside(called, optimizer):
        @torch.no_grad()
        def evaluate(step):
            called.eval()
            called(batch(MLP, 99)[0])
            called.train()

        return dict.fromkeys(places, evaluate)

    return beside


def reads(called, optimizer):
    def read(step):
        assert optimizer.stats.steps == step
        assert len(optimizer.summary().parameters) == 4
        assert len(optimizer.choices()) == (4 if step else 0)

    return {"before": read}


def calls_twice(called, optimizer):
    def loss(x, y):
        halves = zip(x.chunk(2), y.chunk(2), strict=True)
        return sum(F.cross_entropy(called(inputs), labels) for inputs, labels in halves) / 2

    return {"loss": loss}


def calls_and_differentiates_twice(called, optimizer):
    def loss(x, y):
        first, second = (F.cross_entropy(called(a), b) / 2 for a, b in list(zip(x.chunk(2), y.chunk(2), strict=True)))
        first.backward()
        return second

    return {"loss": loss}


def damped_by_losses(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **{**OPTIONS, "scaling": "none", "damping": LevenbergMarquardt(0.1)})
    for step in range(STEPS):
        x, y = part_of(step, rank, count)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(called(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return called


def gradients_become_zeros(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        (called if step % 2 else optimizer).zero_grad(set_to_none=False)
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
        if step == 6:
            called.zero_grad()
    return called


def an_empty_batch_on_one_rank(rank, count):
    """Each rank in turn has all samples, and the other one has none."""
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **{**OPTIONS, "refresh_every": 2})
    for step in range(STEPS):
        has_all = count == 1 or step // 2 % 2 == rank
        x, y = (part[: SAMPLES * has_all] for part in batch(MLP, step))
        optimizer.zero_grad()
        (F.cross_entropy(called(x), y, reduction="sum") * count / SAMPLES).backward()
        optimizer.step()
    return called


def scaled(rank, count):
    """The loss of one rank is infinite in one step, in another a gradient of which only the last rank has a part."""
    called = wrapped(made(MLP), count)
    optimizer, scaler = TENGraD(called, **OPTIONS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        scaler.scale(loss * torch.inf if step == 3 and rank == 0 else loss).backward()
        if step == 5 and rank == count - 1:
            grad = called[0].weight.grad
            (grad if count == 1 else grad.to_local())[-1, 0] = torch.inf
        if step == 7:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(called.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return called


LOOPS = {
    "parameters stay whole after forwards": plain(wrap=lambda model: sharded(model, reshard_after_forward=False)),
    "two layers are one group": plain(wrap=in_one_group),
    "the root only": plain(wrap=fully_shard),
    "the root only, evaluated everywhere": plain(wrap=fully_shard, beside=evaluates("before", "between", "after")),
    "blocks": plain(lambda count: blocks(), by_blocks),
    "checkpoints": plain(lambda count: blocks(count > 1), by_blocks),
    "checkpoint_wrapper": plain(wrapped_in_checkpoints, by_blocks),
    "frozen layers": plain(with_frozen_layers, by_blocks),
    "frozen and thawed": plain(beside=freezes),
    "two groups": plain(groups=two_groups),
    "weights and biases": plain(groups=weights_and_biases),
    "a group is added": plain(groups=lambda called: called[2].parameters(), beside=adds_a_group),
    "clipped": plain(beside=clips),
    "LevenbergMarquardt": damped_by_losses,
    "evaluated everywhere": plain(beside=evaluates("before", "between", "after")),
    "two forwards, one backward": plain(beside=calls_twice),
    "two forwards, then two backwards": plain(beside=calls_and_differentiates_twice),
    "zeros for None": gradients_become_zeros,
    "a rank without samples": an_empty_batch_on_one_rank,
    "verified always": plain(verify="always"),
    "empirical": plain(fisher="empirical"),
    "empirical, one backward of two forwards": plain(beside=calls_twice, fisher="empirical"),
    "a rate as a tensor": plain(lr=torch.tensor(0.03)),
    "Nesterov, other decay": plain(nesterov=True, weight_decay=0.1, decoupled_weight_decay=False),
    "maximized": plain(maximize=True, lr=0.001),
    "schedules": plain(beside=schedules, damping=lambda step: 0.1 / (1 + step)),
    "compiled layers": plain(compiled_layers),
    "GradScaler": scaled,
    "read": plain(beside=reads),
}
