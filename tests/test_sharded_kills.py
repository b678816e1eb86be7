"""Ranks of `fully_shard` that are killed: the others raise, and the checkpoint before stays whole."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import several_processes
import sharded_states
import torch
import torch.distributed as dist
from distributed_cases import whole
from sharded_states import PAUSE, STEPS, new, train

from tengrad_triton.sharding.shards import Shards

pytestmark = pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(call, function):
    """Return a function that kills the process at its n-th call, and is another one before."""
    calls = []

    def counted(*arguments, **named):
        calls.append(None)
        return die() if len(calls) == call else function(*arguments, **named)

    return counted


def within_backward(model):
    model[0].register_forward_hook(lambda _, __, output: output.register_hook(die) and None)


# Where a rank is killed: how many steps are taken before, and what of that rank is changed.
MOMENTS = {
    "a forward": (PAUSE, lambda model: model[2].register_forward_pre_hook(die)),
    "a backward": (PAUSE, within_backward),
    "a step between refreshes": (PAUSE, lambda _: patched(Shards, "totals", 1)),
    "the exchange of a refresh": (6, lambda _: patched(dist, "all_gather_object", 2)),
    "the sums of a refresh": (6, lambda _: patched(Shards, "total", 2)),
}


def patched(owner, name, call):
    mock.patch.object(owner, name, dying_at(call, getattr(owner, name))).start()


def trained_until_killed(rank, folder, moment):
    """Return the error of a rank that survives, after how many seconds, and whether its parameters have changed."""
    before, change = MOMENTS[moment]
    both = new("MLP", 3)
    _, model, optimizer = both
    train(both, rank, 3)
    sharded_states.save_folder(folder, PAUSE, both)
    train(both, rank, 3, PAUSE, before - PAUSE)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    old = [p.to_local().clone() for p in own]
    if rank == 2:
        change(model)
    start = time.monotonic()
    try:
        train(both, rank, 3, before, 1)
    except RuntimeError as error:
        took = time.monotonic() - start
        return str(error), took, all(map(torch.equal, old, (p.to_local() for p in own)))
    return None


def resumed_after(rank, count, folders):
    ends = []
    for folder in folders:
        both = new("MLP", count)
        assert sharded_states.load_newest(folder, both, count) == PAUSE
        ends.append(train(both, rank, count, PAUSE, STEPS))
    return ends


def test_a_killed_rank_ends_the_others_and_one_less_goes_on(tmp_path):
    folders = {moment: tmp_path / moment.replace(" ", "-") for moment in MOMENTS}
    for moment, folder in folders.items():
        folder.mkdir()
        *survivors, killed = several_processes.outcomes_of(3, trained_until_killed, str(folder), moment)
        assert isinstance(killed, several_processes.Failure)
        for found in survivors:
            assert isinstance(found, tuple), (moment, found)
            error, took, is_as_before = found
            assert error
            assert took < several_processes.TIMEOUT, moment
            assert is_as_before, moment
    alone = sharded_states.resumed_alone("MLP")
    for ends in several_processes.run(2, resumed_after, 2, [str(folder) for folder in folders.values()]):
        assert all((end - alone).abs().max() <= 1e-10 for end in ends)


# -- while a checkpoint is saved -----------------------------------------------------------------------------------

# Who is killed when, which call of which function that is, and whether the new checkpoint is whole by then.
SAVES = {
    "rank 1 writes": (1, "fsync", 1, False),
    "rank 0 writes": (0, "fsync", 1, False),
    "rank 0 writes the list of all": (0, "fsync", 2, False),
    "rank 0 has it written": (0, "rename", 1, False),
    "rank 0 renames": (0, "rename", 2, False),
    "all is written": (0, None, 1, True),
}


def mark(both, step):
    """Give a parameter and its momentum numbers that say in which step they were."""
    _, model, optimizer = both
    with torch.no_grad():
        model[2].bias.fill_(step)
        optimizer.state[model[2].bias]["momentum_buffer"].fill_(step)


def saved_until_killed(rank, folder, moment):
    both = new("MLP", 2)
    mark(both, 1)
    sharded_states.save_folder(folder, 1, both)
    mark(both, 2)
    who, name, call, _ = SAVES[moment]
    if rank == who and name is not None:
        patched(os, name, call)
    sharded_states.save_folder(folder, 2, both)
    return die() if rank == who else dist.barrier()


def newest_of(folder):
    """Return the step of the newest checkpoint, which is whole: it loads in one process."""
    both = new("MLP", 1)
    step = sharded_states.load_newest(folder, both, 1)
    _, model, optimizer = both
    assert (model[2].bias == step).all()
    assert (optimizer.state[model[2].bias]["momentum_buffer"] == step).all()
    return step


@pytest.mark.parametrize("moment", SAVES)
def test_a_kill_within_a_save_leaves_the_checkpoint_before(moment, tmp_path):
    who, _, _, is_whole = SAVES[moment]
    outcomes = several_processes.outcomes_of(2, saved_until_killed, str(tmp_path), moment)
    assert outcomes[who] == ""
    assert "Error" in outcomes[1 - who] or "Exception" in outcomes[1 - who]
    assert (tmp_path / "part").exists() != is_whole
    assert newest_of(tmp_path) == (2 if is_whole else 1)
    again = several_processes.run(2, saved_again, str(tmp_path))
    assert again == [3, 3]
    assert newest_of(tmp_path) == 3


def saved_again(rank, folder):
    """Load what a killed run has left, and save the next checkpoint."""
    both = new("MLP", 2)
    sharded_states.load_newest(folder, both, 2)
    mark(both, 3)
    sharded_states.save_folder(folder, 3, both)
    return int(whole(both[1][2].bias)[0])


def saved_over_and_over(rank, folder, victims):
    both, took = new("MLP", 2), 0.0
    for step in range(1, 10**6):
        mark(both, step)
        start = time.monotonic()
        sharded_states.save_folder(folder, step, both)
        took = time.monotonic() - start
        if step == 2 and rank in victims:
            timer = threading.Timer(random.uniform(0, 4 * took), die)
            timer.daemon = True
            timer.start()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    halfway = 0
    for kill in range(12):
        folder = Path(tmp_path) / str(kill)
        folder.mkdir()
        several_processes.outcomes_of(2, saved_over_and_over, str(folder), [[0], [1], [0, 1]][kill % 3])
        assert newest_of(folder) >= 2
        halfway += (folder / "part").exists()
    assert halfway > 0  # else no kill came within a save
