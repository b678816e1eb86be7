"""Meshes of `fully_shard`, its switches, and forwards beside those of steps, in loops like `sharded_loop_cases`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from distributed_cases import SAMPLES, Case, batch, made, of, sharded
from sharded_loop_cases import MLP, OPTIONS, STEPS, Blocks, blocks, by_blocks, part_of, plain, steps, wrapped
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tengrad_triton import TENGraD, compile_train_step

MICRO_BATCHES = 4


def shards_in(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def hybrid(count, shards=2):
    """Return the MLP on a mesh whose second dimension has this many ranks."""
    if count == 1:
        return made(MLP)
    return sharded(made(MLP), init_device_mesh("cpu", (count // shards, shards), mesh_dim_names=("copies", "shards")))


def among_copies(rank, count):
    called = hybrid(count)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def copies_only(rank, count):
    called = hybrid(count, shards=1)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def among_copies_clipped_and_scaled(rank, count):
    called = hybrid(count)
    optimizer, scaler = TENGraD(called, **OPTIONS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        scaler.scale(loss * torch.inf if step == 3 and rank == 0 else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(called.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return called


def accumulated(called, rank, count, switch=None):
    """Train with several micro-batches in each step; a switch of the model is off for all but the last one."""
    optimizer = TENGraD(called, **OPTIONS)
    for step in range(STEPS):
        x, y = part_of(step, rank, count)
        optimizer.zero_grad()
        for place in range(MICRO_BATCHES):
            if count > 1 and switch is not None:
                getattr(called, switch)(place == MICRO_BATCHES - 1)
            own = F.cross_entropy(called(x[place::MICRO_BATCHES]), y[place::MICRO_BATCHES])
            (own / MICRO_BATCHES).backward()
        optimizer.step()
    return called


def accumulated_among_copies(rank, count):
    return accumulated(hybrid(count), rank, count, "set_requires_all_reduce")


def accumulated_in_parts(rank, count):
    return accumulated(wrapped(made(MLP), count), rank, count)


def accumulated_whole(rank, count):
    return accumulated(wrapped(made(MLP), count), rank, count, "set_requires_gradient_sync")


def accumulated_with_parameters_kept(rank, count):
    return accumulated(wrapped(made(MLP), count), rank, count, "set_reshard_after_backward")


def accumulated_in_float32(rank, count):
    """Gradients are added up in another type than they have, in `unsharded_accumulated_grad`, and rounded to it."""
    called = wrapped(made(MLP), count, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return accumulated(called, rank, count, "set_requires_gradient_sync")


def one_rank_in_each_mesh(rank, count, takes_steps=steps):
    called = wrapped(made(MLP), count, mesh=DeviceMesh("cpu", [rank])) if count > 1 else made(MLP)
    takes_steps(called, TENGraD(called, **{**OPTIONS, "likelihood": "categorical"}), 0, 1)
    return called


def one_rank_in_each_mesh_by_the_compiled_step(rank, count):
    def compiled(called, optimizer, rank, parts):
        take = compile_train_step(called, F.cross_entropy, optimizer, backend="aot_eager")
        for step in range(STEPS):
            take(*part_of(step, rank, parts))
        assert "several processes" in take.why_plain

    return one_rank_in_each_mesh(rank, count, compiled if count > 1 else steps)


def partly_whole_after_forward(rank, count):
    called = wrapped(made(MLP), count, reshard_after_forward=2)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def prefetched(rank, count):
    called = wrapped(made(Case(Blocks)), count, by_blocks)
    if count > 1:
        first, second = called.blocks
        called.set_modules_to_forward_prefetch([first])
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return called


def whole_by_hand(rank, count):
    called = wrapped(made(MLP), count)

    def unshard(step):
        if count > 1:
            called.unshard()

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=unshard)
    return called


def added_up_gradients(fisher):
    """The ranks' gradients are added up, not averaged: the loss of each is its part of the whole sum."""

    def loop(rank, count):
        called = wrapped(made(MLP), count)
        for module in shards_in(called):
            module.set_gradient_divide_factor(1.0)

        def loss(x, y):
            return F.cross_entropy(called(x), y, reduction="sum") / SAMPLES

        steps(called, TENGraD(called, **of(fisher)), rank, count, loss=loss)
        return called

    return loop


def with_a_forward_beside(when, clips=False, fisher="exact"):
    """A forward with gradients has no backward: its whole parameters do not stay, neither for a step nor a caller."""

    def loop(rank, count):
        called = wrapped(made(MLP), count)
        optimizer = TENGraD(called, **of(fisher))

        def log(step):
            called(batch(MLP, 99)[0])
            if clips:
                nn.utils.clip_grad_norm_(called.parameters(), 0.1)

        steps(called, optimizer, rank, count, **{when: log})
        return called

    return loop


def a_forward_that_fails(rank, count):
    called = wrapped(made(MLP), count)

    def fail(step):
        try:
            called(torch.zeros(4, 99, dtype=torch.float64))
        except RuntimeError:
            return
        raise AssertionError("expected an error")

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=fail)
    return called


def gradients_of_inputs_first(rank, count):
    called = wrapped(made(MLP), count)

    def loss(x, y):
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(called(x), y) * len(x), x)
        return F.cross_entropy(called((x + 0.1 * grad.sign()).detach()), y)

    steps(called, TENGraD(called, **OPTIONS), rank, count, loss=loss)
    return called


def parameters_are_loaded(rank, count):
    called = wrapped(made(MLP), count)
    start = {name: p.clone() for name, p in made(MLP).state_dict().items()}

    def load(step):
        if step == 6:
            set_model_state_dict(called, start, options=StateDictOptions(full_state_dict=True))

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=load)
    return called


def made_while_the_model_is_whole(rank, count):
    called = wrapped(made(MLP), count, fully_shard)
    with torch.no_grad():
        called(batch(MLP, 0)[0])
    optimizer = TENGraD(called, list(made_parameters(called, count)[2:]), **OPTIONS)

    def add(step):
        if step == 4:
            with torch.no_grad():
                called(batch(MLP, 0)[0])
            optimizer.add_param_group({"params": made_parameters(called, count)[:2]})

    steps(called, optimizer, rank, count, before=add)
    return called


def made_parameters(called, count):
    """Return the model's own parameters, after a forward that has left whole ones in their places."""
    for module in shards_in(called):
        module.reshard()
    return list(called.parameters())


def compiled_blocks(count):
    model = blocks(count > 1)
    for block in model.blocks if count > 1 else ():
        block.compile(backend="aot_eager")
    return model


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


LOOPS = {
    "compiled after fully_shard": compiled_after,
    "compile_train_step": compiled_step,
    "each micro-batch sends": accumulated_in_parts,
    "the last micro-batch sends": accumulated_whole,
    "one rank in each mesh": one_rank_in_each_mesh,
    "one rank in each mesh, compile_train_step": one_rank_in_each_mesh_by_the_compiled_step,
    "copies only": copies_only,
    "unshard": whole_by_hand,
    "gradients are added up": added_up_gradients("exact"),
    "gradients are added up, empirical": added_up_gradients("empirical"),
    "a forward more, before": with_a_forward_beside("before"),
    "a forward more, between": with_a_forward_beside("between"),
    "a forward more, after": with_a_forward_beside("after"),
    "a forward more, then clipped": with_a_forward_beside("after", clips=True),
    "a forward more, then clipped, empirical": with_a_forward_beside("after", clips=True, fisher="empirical"),
    "a forward fails": a_forward_that_fails,
    "gradients of inputs": gradients_of_inputs_first,
    "parameters are loaded": parameters_are_loaded,
    "made and enlarged after forwards": made_while_the_model_is_whole,
}
SLOW = {
    "compiled and checkpointed blocks": plain(compiled_blocks, by_blocks),
    "micro-batches keep the parameters": accumulated_with_parameters_kept,
    "prefetched": prefetched,
}
IN_FOUR = {
    "copies": among_copies,
    "copies, clipped and scaled": among_copies_clipped_and_scaled,
    "copies, accumulated": accumulated_among_copies,
    "reshard_after_forward=2": partly_whole_after_forward,
    "accumulated": accumulated_whole,
}
