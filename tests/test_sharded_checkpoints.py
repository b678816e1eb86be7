"""Checkpoints of models of `fully_shard`: training goes on as in one process that was saved without a curvature."""

from pathlib import Path

import pytest
import several_processes
import sharded_states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from distributed_cases import whole
from sharded_states import PAUSE, STEPS, TRAINED, load, new, of_width, step_of, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from tengrad_triton import TENGraD

pytestmark = pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled")

TOLERANCE = 1e-10
WAYS_OF = {name: ["sharded"] for name in TRAINED} | {"MLP": list(sharded_states.WAYS)}
BROADCAST = {"full_state_dict": True, "broadcast_from_rank0": True}


def far(ends, name, pause=PAUSE):
    alone = sharded_states.resumed_alone(name, pause)
    return max((end - alone).abs().max().item() for end in ends)


# -- the same processes --------------------------------------------------------------------------------------------


def resumed_in_place(rank, folder):
    """Return where each case ends by each way, and by a state that only the first rank has."""
    ends = {}
    for name, ways in WAYS_OF.items():
        old = new(name, 2)
        train(old, rank, 2)
        for way in ways:
            options = sharded_states.WAYS[way]
            sharded_states.save(old, f"{folder}/{name}-{way}", 2, **options)
            again = new(name, 2)
            load(again, f"{folder}/{name}-{way}", 2, **options)
            ends[name, way] = train(again, rank, 2, PAUSE, STEPS)
        states = sharded_states.states_of(old, full_state_dict=True, cpu_offload=True)
        assert bool(states["optimizer"]) == (rank == 0)
        again = new(name, 2)
        sharded_states.give(again, states, **BROADCAST)
        ends[name, "of the first rank"] = train(again, rank, 2, PAUSE, STEPS)
    return ends


def test_every_way_to_save_goes_on_as_one_process(tmp_path):
    of_ranks = several_processes.run(2, resumed_in_place, str(tmp_path))
    errors = {key: far([ends[key] for ends in of_ranks], key[0]) for key in of_ranks[0]}
    assert len(errors) == sum(len(ways) + 1 for ways in WAYS_OF.values())
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}


def paused_when_due(rank):
    """Return what differs between a run and its resumed one, which refresh at the same steps, and how often."""
    old = new("MLP", 2)
    train(old, rank, 2, steps=6)
    again = new("MLP", 2)
    again[1].load_state_dict(old[1].state_dict())
    again[2].load_state_dict(old[2].state_dict())
    ends = [train(both, rank, 2, 6, STEPS) for both in (old, again)]
    return (ends[0] - ends[1]).abs().max().item(), again[2].stats.last_refresh


def test_a_pause_before_a_refresh_changes_nothing():
    assert several_processes.run(2, paused_when_due) == [(0.0, 9), (0.0, 9)]


def saved_beside_training(rank, folder):
    """Return where a state goes on that is written while its optimizer trains."""
    old = new("MLP", 2)
    train(old, rank, 2)
    of_writers = dist.new_group()  # messages of another thread
    written = dcp.async_save(sharded_states.states_of(old), checkpoint_id=folder, process_group=of_writers)
    train(old, rank, 2, PAUSE, 2)
    written.result()
    again = new("MLP", 2)
    load(again, folder, 2)
    return train(again, rank, 2, PAUSE, STEPS)


def test_a_state_is_that_of_its_moment(tmp_path):
    assert far(several_processes.run(2, saved_beside_training, str(tmp_path / "new")), "MLP") <= TOLERANCE


# -- other numbers of processes, whole parameters ------------------------------------------------------------------


def of_folders(count, jobs):
    if count == 1:
        return [sharded_states.resumed_by(0, 1, jobs)]
    return several_processes.run(count, sharded_states.resumed_by, count, jobs)


def check_resumed(of_ranks):
    for key in of_ranks[0]:
        assert all(ends[key][1] for ends in of_ranks), f"{key}: the next step does not refresh"
        error = far([ends[key][0] for ends in of_ranks], key[2])
        assert error <= TOLERANCE, (key, error)


def made_folders(tmp_path, *wanted):
    folders = [str(tmp_path / f"{kind}-{count}") for count, kind in wanted]
    for folder, (count, kind) in zip(folders, wanted, strict=True):
        Path(folder).mkdir()
        if count == 1:
            sharded_states.saved_by(0, 1, folder, kind)
        else:
            several_processes.run(count, sharded_states.saved_by, count, folder, kind)
    return folders


def test_another_number_of_processes_goes_on(tmp_path):
    three, two = made_folders(tmp_path, (3, "fully_shard"), (2, "fully_shard"))
    check_resumed(of_folders(2, [(three, "fully_shard")]))
    check_resumed(of_folders(3, [(two, "fully_shard")]))
    check_resumed(of_folders(1, [(three, "plain"), (two, "plain")]))


def test_whole_parameters_and_parts_load_from_each_other(tmp_path):
    """What has a curvature of whole parameters loses it where they are cut: no part of it is that of the outputs."""
    replicas, alone, parts = made_folders(tmp_path, (2, "DDP"), (1, "plain"), (2, "fully_shard"))
    jobs = [(replicas, "fully_shard"), (alone, "fully_shard"), (parts, "DDP")]
    check_resumed(of_folders(2, jobs))


@pytest.mark.slow
def test_four_processes_and_one_go_on(tmp_path):
    four, one = made_folders(tmp_path, (4, "fully_shard"), (1, "plain"))
    check_resumed(of_folders(1, [(four, "plain")]))
    check_resumed(of_folders(2, [(four, "fully_shard")]))
    check_resumed(of_folders(4, [(one, "fully_shard"), (four, "fully_shard"), (four, "DDP")]))


# -- what a state has ----------------------------------------------------------------------------------------------


def kinds_of(model, optimizer):
    """Return the names of each parameter's entries, and the kinds and the parts of its tensors."""
    for parameter in model.parameters():
        for x in optimizer.state[parameter].values():
            if isinstance(x, torch.Tensor):
                assert isinstance(x, DTensor)
                assert x.placements == parameter.placements == (Shard(0),)
                assert x.device_mesh == parameter.device_mesh
                assert x.to_local().shape == parameter.to_local().shape
    return [{name: getattr(x, "dtype", None) for name, x in optimizer.state[p].items()} for p in model.parameters()]


def entries_of_ranks(rank, folder):
    torch.manual_seed(0)
    old = of_width(7, torch.bfloat16)
    fresh = kinds_of(*old)
    for step in range(4):
        step_of(*old, rank, step)
    sharded_states.save((None, *old), folder, 2)
    again = of_width(7, torch.bfloat16)
    load((None, *again), folder, 2)
    for left, right in zip(old[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(whole(left), whole(right))
        for key in ("momentum_buffer", "wide_copy"):
            assert torch.equal(whole(old[1].state[left][key]), whole(again[1].state[right][key]))
    step_of(*again, rank, 4)
    return fresh, kinds_of(*old), kinds_of(*again), kinds_of(*new("MLP", 2)[1:])


def test_momenta_and_wide_copies_are_parts_like_their_parameters(tmp_path):
    wide = {"momentum_buffer": torch.float32, "wide_copy": torch.float32}
    double = {"momentum_buffer": torch.float64}
    for fresh, trained, resumed, of_doubles in several_processes.run(2, entries_of_ranks, str(tmp_path)):
        assert fresh == [{**wide, "tengrad": None}, wide, wide, wide]
        assert trained == resumed == fresh
        assert of_doubles == [{**double, "tengrad": None}, double, double, double]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_optimizer_names_what_a_trained_one_has(dtype):
    """torch.distributed.checkpoint looks for these names in what it loads."""
    model = nn.Linear(3, 2).to(dtype)
    optimizer = TENGraD(model)
    names = [sorted(optimizer.state[p]) for p in model.parameters()]
    F.cross_entropy(model(torch.ones(4, 3, dtype=dtype)).float(), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()
    optimizer.state_dict()
    assert [sorted(optimizer.state[p]) for p in model.parameters()] == names


def asked(rank):
    """Return how many messages states take, what hooks see, and what is said about the curvature."""
    both = new("MLP", 2)
    train(both, rank, 2)
    _, model, optimizer = both
    messages = {}
    for name, ask in {
        "state_dict": optimizer.state_dict,
        "torch's": lambda: get_optimizer_state_dict(model, optimizer),
        "full": lambda: sharded_states.states_of(both, full_state_dict=True),
    }.items():
        with CommDebugMode() as counted:
            ask()
        messages[name] = counted.get_total_counts()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("asked"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(kinds_in(state)))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(kinds_in(state)))
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(own.stats.steps))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="include_curvature=True cannot be: each process has a curvature of its own"):
        optimizer.state_dict(include_curvature=True)
    return messages, seen, optimizer.include_curvature


def kinds_in(state):
    return {name: type(x).__name__ for name, x in state["state"][0].items()}, sorted(state["state"][0]["tengrad"])


def test_a_state_sends_nothing_and_hooks_see_all_of_it():
    everything = (
        {"momentum_buffer": "DTensor", "tengrad": "dict"},
        ["age", "curvature", "generator", "refresh_every", "scaling", "seed", "steps"],
    )
    for messages, seen, includes in several_processes.run(2, asked):
        assert messages["full"] > 0
        assert messages["state_dict"] == messages["torch's"] == 0
        assert seen[:4] == ["asked", everything, everything, PAUSE]
        assert not includes


def of_whole_files(rank, folder):
    """Return where a state of one process ends, loaded by the optimizer's own method."""
    both = new("MLP", 2)
    load(both, f"{folder}/MLP", 2)
    state = torch.load(Path(folder) / "MLP-0.pt", weights_only=True)
    assert state["state"][0]["tengrad"]["curvature"].numel() > 0
    both[2].load_state_dict(state)
    return train(both, rank, 2, PAUSE, STEPS)


def test_a_whole_state_is_cut(tmp_path):
    sharded_states.saved_by(0, 1, tmp_path, "plain")
    assert far(several_processes.run(2, of_whole_files, str(tmp_path)), "MLP") <= TOLERANCE
