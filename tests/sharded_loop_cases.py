"""Loops as people write them around a model of `fully_shard`: each function returns the model after its steps.

In one process each is the plain loop, with the whole batch and whole parameters.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from distributed_cases import CLASSES, SAMPLES, Case, batch, made, of, sharded
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tengrad_triton import LevenbergMarquardt, TENGraD, compile_train_step

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


def wrapped(model, count, wrap=sharded, **settings):
    return wrap(model, **settings) if count > 1 else model


def part_of(step, rank, count):
    n = SAMPLES // count
    return tuple(x[rank * n : rank * n + n] for x in batch(MLP, step))


def steps(called, optimizer, rank, count, before=None, between=None, after=None, loss=None, first=0, last=STEPS):
    """Train; the functions are called before each forward, before its backward, and before the step."""
    for step in range(first, last):
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


def layouts(wrap, **settings):
    def loop(rank, count):
        called = wrapped(made(MLP), count, wrap, **settings)
        steps(called, TENGraD(called, **OPTIONS), rank, count)
        return called

    return loop


def whole_after_forward(rank, count):
    return layouts(sharded, reshard_after_forward=False)(rank, count)


def in_one_group(rank, count):
    def wrap(model):
        fully_shard([model[0], model[2]])
        return fully_shard(model)

    return layouts(wrap)(rank, count)


def root_only(rank, count):
    return layouts(fully_shard)(rank, count)


def blocks_and_root(rank, count, checkpoints=False):
    model = made(Case(lambda: Blocks(checkpoints)))
    called = wrapped(model, count, by_blocks)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def checkpointed(rank, count):
    return blocks_and_root(rank, count, checkpoints=count > 1)


def checkpoint_wrapper_around_blocks(rank, count):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model = made(Case(Blocks))
    if count > 1:
        for i, b in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(b)
    called = wrapped(model, count, by_blocks)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def frozen_and_thawed(rank, count):
    model = made(MLP)
    called = wrapped(model, count)

    def freeze(step):
        model[0].requires_grad_(step < 2 or step > 4)

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=freeze)
    return called


def frozen_from_the_start(rank, count):
    model = made(Case(Blocks))
    model.blocks[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    called = wrapped(model, count, by_blocks)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def frozen_in_one_group(rank, count):
    model = made(MLP)
    model[0].weight.requires_grad_(False)
    called = wrapped(model, count, fully_shard)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def of_two_groups(rank, count):
    model = made(MLP)
    called = wrapped(model, count)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.01, "damping": 0.2, "momentum": 0.5},
        {"params": list(model[2].parameters()), "weight_decay": 0.1},
    ]
    steps(called, TENGraD(called, groups, **OPTIONS), rank, count)
    return called


def weights_decay_and_biases_do_not(rank, count):
    model = made(MLP)
    called = wrapped(model, count)
    groups = [
        {"params": [p for n, p in called.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in called.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
    ]
    steps(called, TENGraD(called, groups, **OPTIONS), rank, count)
    return called


def a_group_is_added(rank, count):
    model = made(MLP)
    called = wrapped(model, count)
    optimizer = TENGraD(called, model[2].parameters(), **OPTIONS)

    def add(step):
        if step == 4:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})

    steps(called, optimizer, rank, count, before=add)
    return called


def clipped(rank, count):
    called = wrapped(made(MLP), count)

    def clip(step):
        nn.utils.clip_grad_norm_(called.parameters(), 0.1)

    steps(called, TENGraD(called, **OPTIONS), rank, count, after=clip)
    return called


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


def evaluated(when):
    def loop(rank, count):
        called = wrapped(made(MLP), count)

        @torch.no_grad()
        def evaluate(step):
            called.eval()
            called(batch(MLP, 99)[0])
            called.train()

        steps(called, TENGraD(called, **OPTIONS), rank, count, **{when: evaluate})
        return called

    return loop


def evaluated_before_the_forward(rank, count):
    return evaluated("before")(rank, count)


def evaluated_before_the_backward(rank, count):
    return evaluated("between")(rank, count)


def evaluated_before_the_step(rank, count):
    return evaluated("after")(rank, count)


def two_forwards(rank, count):
    called = wrapped(made(MLP), count)

    def loss(x, y):
        half = len(x) // 2
        return (F.cross_entropy(called(x[:half]), y[:half]) + F.cross_entropy(called(x[half:]), y[half:])) / 2

    steps(called, TENGraD(called, **OPTIONS), rank, count, loss=loss)
    return called


def two_forwards_and_backwards(rank, count):
    called = wrapped(made(MLP), count)

    def loss(x, y):
        half = len(x) // 2
        first, second = F.cross_entropy(called(x[:half]), y[:half]) / 2, F.cross_entropy(called(x[half:]), y[half:]) / 2
        first.backward()
        return second

    steps(called, TENGraD(called, **OPTIONS), rank, count, loss=loss)
    return called


def zeroed(rank, count, **options):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        if step % 2:
            called.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return called


def zeroed_by_the_model(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        called.zero_grad()
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return called


def zeroed_after_the_step(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
        called.zero_grad(set_to_none=False)
    return called


def an_empty_batch_on_one_rank(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **{**OPTIONS, "refresh_every": 2})
    for step in range(STEPS):
        x, y = batch(MLP, step)
        if count > 1:
            empty = step % 3
            own = slice(0, SAMPLES) if empty != rank and empty < 2 else slice(0, 0) if empty == rank else slice(rank * 8, rank * 8 + 8)
            x, y = x[own], y[own]
        optimizer.zero_grad()
        (F.cross_entropy(called(x), y, reduction="sum") * count / SAMPLES).backward()
        optimizer.step()
    return called


def with_options(**options):
    def loop(rank, count):
        called = wrapped(made(MLP), count)
        steps(called, TENGraD(called, **{**OPTIONS, **options}), rank, count)
        return called

    return loop


def always_verified(rank, count):
    return with_options(verify="always")(rank, count)


def empirical(rank, count):
    return with_options(fisher="empirical")(rank, count)


def rate_as_a_tensor(rank, count):
    return with_options(lr=torch.tensor(0.03))(rank, count)


def nesterov(rank, count):
    return with_options(nesterov=True, momentum=0.8, weight_decay=0.1, decoupled_weight_decay=False)(rank, count)


def maximized(rank, count):
    return with_options(maximize=True, lr=0.001)(rank, count)


def scheduled(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **{**OPTIONS, "damping": lambda step: 0.1 / (1 + step)})
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS, cycle_momentum=False)

    def advance(step):
        if step:
            scheduler.step()

    steps(called, optimizer, rank, count, before=advance)
    return called


def compiled_before(rank, count):
    model = made(MLP)
    for layer in model if count > 1 else ():
        layer.compile(backend="aot_eager")
    called = wrapped(model, count)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def compiled_after(rank, count):
    model = wrapped(made(MLP), count)
    called = torch.compile(model, backend="aot_eager") if count > 1 else model
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return model


def compiled_step(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)
    if count == 1:
        steps(called, optimizer, rank, count)
        return called
    take = compile_train_step(called, F.cross_entropy, optimizer, backend="aot_eager")
    for step in range(STEPS):
        take(*part_of(step, rank, count))
    assert "several processes" in take.why_plain
    return called


def scaled(rank, count):
    called = wrapped(made(MLP), count)
    optimizer, scaler = TENGraD(called, **OPTIONS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        scaler.scale(loss * torch.inf if step == 3 and rank == 0 else loss).backward()
        if step == 5:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(called.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return called


def scaled_with_one_bad_entry(rank, count):
    """One gradient that only one rank has a part of is infinite."""
    called = wrapped(made(MLP), count)
    optimizer, scaler = TENGraD(called, **OPTIONS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(called(x), y)).backward()
        if step == 3 and rank == count - 1:
            grad = called[0].weight.grad
            (grad if count == 1 else grad._local_tensor)[-1, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return called


def read_in_between(rank, count):
    called = wrapped(made(MLP), count)
    optimizer = TENGraD(called, **OPTIONS)

    def read(step):
        str(optimizer.stats), str(optimizer.summary()), optimizer.choices()

    steps(called, optimizer, rank, count, before=read, between=read, after=read)
    read(0)
    return called


LOOPS = [
    whole_after_forward, in_one_group, root_only, blocks_and_root, checkpointed, checkpoint_wrapper_around_blocks,
    frozen_and_thawed, frozen_from_the_start, frozen_in_one_group, of_two_groups, weights_decay_and_biases_do_not,
    a_group_is_added, clipped, damped_by_losses, evaluated_before_the_forward, evaluated_before_the_backward,
    evaluated_before_the_step, two_forwards, two_forwards_and_backwards, zeroed, zeroed_by_the_model,
    zeroed_after_the_step, an_empty_batch_on_one_rank, always_verified, empirical, rate_as_a_tensor, nesterov, maximized,
    scheduled, compiled_before, compiled_after, compiled_step, scaled, scaled_with_one_bad_entry, read_in_between,
]
