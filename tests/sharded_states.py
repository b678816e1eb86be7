"""Saving and loading models of `fully_shard`: what trains, in how many processes, and ways for its state."""

from __future__ import annotations

import copy
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from distributed_cases import CASES, trained, whole, wrapped
from small_conv import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tengrad_triton import TENGraD

PAUSE, STEPS = 4, 4  # curvatures are refreshed at every third step: the pause is within an interval
TRAINED = {
    "MLP": CASES["MLP, exact"],  # D couples the outputs of several ranks
    "diagonal D": CASES["diagonal D"],
    "tied": replace(CASES["transformer, exact"], shares=(1,)),
}
WAYS = {
    "sharded": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"cpu_offload": True},
}


def new(name, count, kind="fully_shard", mesh=None):
    """Return a case, its model and its optimizer, in one of ``count`` processes."""
    case = replace(TRAINED[name], sharded={"mesh": mesh} if kind == "fully_shard" else None)
    called = wrapped(case, count)
    return case, called, TENGraD(called, **case.options)


def train(both, rank, count, first=0, steps=PAUSE):
    """Return all parameters after some steps."""
    case, called, optimizer = both
    return trained(case, rank, count, steps, called, optimizer, first)


def resumed_alone(name, pause=PAUSE):
    """Return where one process ends that was saved without a curvature."""
    old, again = new(name, 1), new(name, 1)
    train(old, 0, 1, steps=pause)
    again[1].load_state_dict(old[1].state_dict())
    again[2].load_state_dict(old[2].state_dict(include_curvature=False))
    return train(again, 0, 1, pause, STEPS)


def states_of(both, **options):
    states = get_state_dict(*both[1:], options=StateDictOptions(**options))
    return dict(zip(("model", "optimizer"), states, strict=True))


def give(both, states, **options):
    """Load states by the functions of `torch.distributed.checkpoint.state_dict`."""
    chosen = StateDictOptions(**options)
    set_model_state_dict(both[1], states["model"], options=chosen)
    set_optimizer_state_dict(*both[1:], optim_state_dict=states["optimizer"], options=chosen)


def save(both, folder, count, **options):
    dcp.save(states_of(both, **options), checkpoint_id=folder, no_dist=count == 1)


def load(both, folder, count, **options):
    states = states_of(both, **options)
    dcp.load(states, checkpoint_id=folder, no_dist=count == 1)
    give(both, states, **options)


def save_folder(runs, step, both):
    """Save into a new folder, which has its name once all ranks have written (docs/guides/checkpoints.md)."""
    part = Path(runs) / "part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    dist.barrier()
    dcp.save(states_of(both), checkpoint_id=part)
    if dist.get_rank() == 0:
        os.rename(part, Path(runs) / f"step-{step:08}")  # a folder with this name is whole
    dist.barrier()


def load_newest(runs, both, count):
    newest = max(Path(runs).glob("step-*"))
    load(both, newest, count)
    return int(newest.name.removeprefix("step-"))


def saved_by(rank, count, folder, kind="fully_shard", steps=PAUSE):
    """Save every case; what a rank has of the optimizer's state goes to a file of its own too."""
    for name in TRAINED:
        both = new(name, count, kind)
        train(both, rank, count, steps=steps)
        save(both, Path(folder) / name, count)
        torch.save(both[2].state_dict(), Path(folder) / f"{name}-{rank}.pt")


def resumed_by(rank, count, jobs):
    """Return where every case ends that goes on from a folder, as ``kind``; and whether its first step refreshes."""
    ends = {}
    for folder, kind in jobs:
        for name in TRAINED:
            both = new(name, count, kind)
            load(both, Path(folder) / name, count)
            assert both[2].stats.steps == PAUSE
            due = both[2]._refresh_is_due()
            ends[Path(folder).name, kind, name] = train(both, rank, count, PAUSE, STEPS), due
    return ends


def attempt(both, state):
    """Return the error of a state that does not load; nothing has changed then."""
    _, model, optimizer = both
    before = copy.deepcopy([locals_of(optimizer), optimizer.stats, [whole(p) for p in model.parameters()]])
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        assert_same([locals_of(optimizer), optimizer.stats, [whole(p) for p in model.parameters()]], before)
        return str(error)
    return None


def locals_of(optimizer):
    """Return the state with the process's own parts as plain tensors."""
    state = optimizer.state_dict()["state"]
    return {
        key: {name: x.to_local() if isinstance(x, DTensor) else x for name, x in entry.items()}
        for key, entry in state.items()
    }


def says(error, pattern):
    assert re.search(pattern, error), error


def of_width(width, dtype):
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    fully_shard(model[0])
    fully_shard(model)
    return model, TENGraD(model, fisher="exact", refresh_every=3, seed=0)


def step_of(model, optimizer, rank, step):
    generator, dtype = torch.Generator().manual_seed(step), next(model.parameters()).dtype
    x, y = torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x[4 * rank : 4 * rank + 4]).double(), y[4 * rank : 4 * rank + 4]).backward()
    optimizer.step()
