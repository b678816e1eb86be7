"""Checkpoints of models of `fully_shard`: training goes on as in one process that was saved without a curvature."""

import copy
import re
from pathlib import Path

import pytest
import several_processes
import sharded_states
import torch
import torch.nn.functional as F
from distributed_cases import whole
from sharded_states import PAUSE, STEPS, TRAINED, load, new, train
from small_conv import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from tengrad_triton import TENGraD

pytestmark = pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled")

TOLERANCE = 1e-10
BROADCAST = {"full_state_dict": True, "broadcast_from_rank0": True}


def far(ends, name, pause=PAUSE):
    alone = sharded_states.resumed_alone(name, pause)
    return max((end - alone).abs().max().item() for end in ends)


# -- the same processes --------------------------------------------------------------------------------------------


def resumed_in_place(rank, folder):
    """Return where each case ends by each way, and by a state that only the first rank has."""
    ends = {}
    for name in TRAINED:
        old = new(name, 2)
        train(old, rank, 2)
        for way, options in sharded_states.WAYS.items():
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
    assert len(errors) == len(TRAINED) * (len(sharded_states.WAYS) + 1)
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
    check_resumed(of_folders(2, [(three, "fully_shard"), (three, "DDP")]))
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


# -- files of ranks ------------------------------------------------------------------------------------------------


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


def by_files(rank, count, folder, of_rank):
    """Return the error of loading the file of a rank, or where that ends."""
    both = new("MLP", count)
    train(both, rank, count, steps=2)
    state = torch.load(f"{folder}/MLP-{of_rank[rank]}.pt", weights_only=True)
    error = attempt(both, state)
    if error is not None:
        return error
    load(both, f"{folder}/MLP", count)  # the parameters, and the same momenta
    both[2].load_state_dict(state)
    return train(both, rank, count, PAUSE, STEPS)


def test_the_file_of_a_rank_loads_on_that_rank_of_as_many(tmp_path):
    several_processes.run(2, sharded_states.saved_by, 2, str(tmp_path))
    assert far(several_processes.run(2, by_files, 2, str(tmp_path), [0, 1]), "MLP") <= TOLERANCE
    for rank, own in enumerate(several_processes.run(2, by_files, 2, str(tmp_path), [1, 0])):
        says(own, f"momentum_buffer of '0.weight' is part {1 - rank} of 2 .* but this process has part {rank} of 2 ")
    for rank, own in enumerate(several_processes.run(3, by_files, 3, str(tmp_path), [0, 1, 1])):
        says(
            own, f"is part {min(rank, 1)} of 2 .* but this process has part {rank} of 3 .*: use torch.distributed.check"
        )
    error = attempt(new("MLP", 1), torch.load(tmp_path / "MLP-0.pt", weights_only=True))
    says(error, "'0.weight' is part 0 of 2 .* but this parameter is whole; the file of a rank loads on that rank")


def says(error, pattern):
    assert re.search(pattern, error), error


# -- states that do not fit ----------------------------------------------------------------------------------------


def changed(state, place, key, value):
    entry = {**state["state"][place], key: value}
    return {**state, "state": {**state["state"], place: entry}}


def of_own(key, value):
    return lambda state: changed(state, 0, "tengrad", {**state["state"][0]["tengrad"], key: value})


# What is wrong on which ranks, and what those and the others say.
BAD = {
    "a size": (lambda s: changed(s, 2, "momentum_buffer", torch.zeros(3, 6)), r"\(3, 6\) for a .* '2.weight'"),
    "no tensor": (lambda s: changed(s, 1, "momentum_buffer", [1.0]), "momentum of type list for '0.bias'"),
    "steps": (of_own("steps", -1), "the state's steps must be a whole number, got -1"),
    "bytes": (of_own("curvature", torch.ones(99, dtype=torch.uint8)), "its 99 bytes cannot be read"),
    "a setting": (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "lr": -1.0}]}, "lr must be at least 0"),
    "no group": (lambda s: {**s, "param_groups": []}, "the state has 0 parameter groups"),
    "no entries": (lambda s: {**s, "state": {}}, "with an entry 'tengrad'"),
}  # fmt: skip


def bad_states(rank):
    said = {}
    both, twin = new("MLP", 2), new("MLP", 2)
    for one in (both, twin):
        train(one, rank, 2)
    good = both[2].state_dict()
    for name, (damage, _) in BAD.items():
        said[name] = attempt(both, damage(good))
        said[name, "on rank 1"] = attempt(both, damage(good) if rank == 1 else good)
    said["other steps"] = attempt(both, of_own("steps", 4 + rank)(good))
    ends = [train(one, rank, 2, PAUSE, STEPS) for one in (both, twin)]
    return said, torch.equal(*ends)


def test_a_state_that_does_not_fit_changes_nothing_on_any_rank():
    (first, kept), (second, also_kept) = several_processes.run(2, bad_states)
    assert kept
    assert also_kept
    for name, (_, said) in BAD.items():
        for own in (first[name], second[name], second[name, "on rank 1"]):
            says(own, said)
        other = first[name, "on rank 1"]
        assert other == f"rank 1 cannot load its state, so no rank does: ValueError: {second[name, 'on rank 1']}"
    expected = "rank 1 loads a state with steps 5, and rank 0 one with 4: every rank needs the state of the same step"
    assert first["other steps"] == second["other steps"] == expected


# -- what a state has ----------------------------------------------------------------------------------------------


def in_bfloat16():
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()
    fully_shard(model[0])
    fully_shard(model)
    return model, TENGraD(model, fisher="exact", refresh_every=3, seed=0)


def step_in_bfloat16(model, optimizer, rank, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 6, generator=generator).bfloat16(), torch.randint(3, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x[4 * rank : 4 * rank + 4]).float(), y[4 * rank : 4 * rank + 4]).backward()
    optimizer.step()


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
    old = in_bfloat16()
    fresh = kinds_of(*old)
    for step in range(4):
        step_in_bfloat16(*old, rank, step)
    sharded_states.save((None, *old), folder, 2)
    again = in_bfloat16()
    load((None, *again), folder, 2)
    for left, right in zip(old[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(whole(left), whole(right))
        for key in ("momentum_buffer", "wide_copy"):
            assert torch.equal(whole(old[1].state[left][key]), whole(again[1].state[right][key]))
    step_in_bfloat16(*again, rank, 4)
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
