"""States of models of `fully_shard` that do not fit: every rank raises, and nothing has changed on any of them."""

import copy
from pathlib import Path

import pytest
import several_processes
import sharded_states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_states import PAUSE, STEPS, attempt, load, locals_of, new, of_width, says, step_of, train
from small_conv import assert_same
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

pytestmark = pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled")

TOLERANCE = 1e-10


def saved_and_loaded(rank, folder):
    """Save a file of each rank; return where each ends with its own, and the errors with those of the other."""
    sharded_states.saved_by(rank, 2, folder)
    dist.barrier()
    return by_file(rank, 2, folder, rank), by_file(rank, 2, folder, 1 - rank)


def by_file(rank, count, folder, other):
    """Return the error of loading the file of a rank, or where that ends."""
    both = new("MLP", count)
    train(both, rank, count, steps=2)
    state = torch.load(f"{folder}/MLP-{other}.pt", weights_only=True)
    error = attempt(both, state)
    if error is not None:
        return error
    load(both, f"{folder}/MLP", count)  # the parameters, and the same momenta
    both[2].load_state_dict(state)
    return train(both, rank, count, PAUSE, STEPS)


def among_three(rank, folder):
    return by_file(rank, 3, folder, min(rank, 1))


def test_the_file_of_a_rank_loads_on_that_rank_of_as_many(tmp_path):
    alone = sharded_states.resumed_alone("MLP")
    for rank, (end, error) in enumerate(several_processes.run(2, saved_and_loaded, str(tmp_path))):
        assert (end - alone).abs().max() <= TOLERANCE
        says(error, f"momentum_buffer of '0.weight' is part {1 - rank} of 2 .* but this process has part {rank} of 2 ")
    for rank, error in enumerate(several_processes.run(3, among_three, str(tmp_path))):
        says(error, f"is part {min(rank, 1)} of 2 .* process has part {rank} of 3 .*: use torch.distributed.checkpoint")
    error = attempt(new("MLP", 1), torch.load(tmp_path / "MLP-0.pt", weights_only=True))
    says(error, "'0.weight' is part 0 of 2 .* but this parameter is whole; the file of a rank loads on that rank")


def in_groups_of_two(rank, folder):
    """Train four ranks of which each two have the same part; return where a resumed run ends, and one by files."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    old, again, by_file = (sharded_states.new("MLP", 4, mesh=mesh) for _ in range(3))
    train(old, rank, 4)
    sharded_states.save(old, f"{folder}/MLP", 4)
    load(again, f"{folder}/MLP", 4)
    torch.save(old[2].state_dict(), f"{folder}/MLP-{rank}.pt")
    dist.barrier()
    other = torch.load(f"{folder}/MLP-{rank ^ 1}.pt", weights_only=True)
    says(
        attempt(by_file, other), rf"is part \(., {1 - rank % 2}\) of \(2, 2\) .* has part \(., {rank % 2}\) of \(2, 2\)"
    )
    by_file[1].load_state_dict(old[1].state_dict())
    by_file[2].load_state_dict(torch.load(f"{folder}/MLP-{rank}.pt", weights_only=True))
    return [train(both, rank, 4, PAUSE, STEPS) for both in (again, by_file)]


@pytest.mark.slow
def test_replicated_parts_go_on(tmp_path):
    alone = sharded_states.resumed_alone("MLP")
    for ends in several_processes.run(4, in_groups_of_two, str(tmp_path)):
        assert all((end - alone).abs().max() <= TOLERANCE for end in ends)
    for end in several_processes.run(2, resumed_from, str(tmp_path)):
        assert (end - alone).abs().max() <= TOLERANCE


def resumed_from(rank, folder):
    both = new("MLP", 2)
    load(both, f"{folder}/MLP", 2)
    return train(both, rank, 2, PAUSE, STEPS)


def from_a_damaged_folder(rank, folder):
    """Return the error of a checkpoint of which a rank's file is cut short, and where the one before goes on."""
    both = new("MLP", 2)
    train(both, rank, 2)
    for name in ("before", "newest"):
        sharded_states.save(both, f"{folder}/{name}", 2)
    dist.barrier()
    if rank == 0:
        cut = Path(folder) / "newest" / "__1_0.distcp"
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    dist.barrier()
    with pytest.raises(dcp.CheckpointException) as raised:
        load(both, f"{folder}/newest", 2)
    load(both, f"{folder}/before", 2)
    return str(raised.value), train(both, rank, 2, PAUSE, STEPS)


def test_every_rank_raises_where_one_file_is_damaged(tmp_path):
    alone = sharded_states.resumed_alone("MLP")
    for error, end in several_processes.run(2, from_a_damaged_folder, str(tmp_path)):
        says(error, "RANK")
        assert (end - alone).abs().max() <= TOLERANCE


def of_another_width(rank, folder):
    """Return the errors of a checkpoint of another model, by torch's functions, which change nothing."""
    wide, both = (of_width(width, torch.float64) for width in (8, 7))
    for one in (wide, both):
        step_of(*one, rank, 0)
    sharded_states.save((None, *wide), folder, 2)
    before, said = copy.deepcopy(locals_of(both[1])), []
    full = sharded_states.states_of((None, *wide), full_state_dict=True)["optimizer"]
    parts = sharded_states.states_of((None, *wide))["optimizer"]
    for attempted in (
        lambda: load((None, *both), folder, 2),
        lambda: set_optimizer_state_dict(*both, optim_state_dict=parts),
        lambda: set_optimizer_state_dict(*both, optim_state_dict=full, options=StateDictOptions(full_state_dict=True)),
    ):
        with pytest.raises((ValueError, dcp.CheckpointException)) as raised:
            attempted()
        said.append(str(raised.value))
        assert_same(locals_of(both[1]), before)
    return said


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


def test_a_checkpoint_of_another_width_changes_nothing_on_any_rank(tmp_path):
    for by_dcp, *by_itself in several_processes.run(2, of_another_width, str(tmp_path)):
        says(by_dcp, "(?s)ize mismatch .*0.weight")
        for error in by_itself:
            says(error, r"a momentum of shape \(8, 6\) for a parameter of shape \(7, 6\), '0.weight'")


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
