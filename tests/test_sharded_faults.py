"""What models of `fully_shard` are refused: one error on every rank, at once."""

import copy
import pickle

import pytest
import several_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import CASES, FixedLabels, batch, fails_after_its_first_step, made, of, sharded
from sharded_loop_cases import OPTIONS, part_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from tengrad_triton import GaussNewton, TENGraD
from tengrad_triton.baselines import KFAC


def mlp():
    return made(CASES["MLP"])


def optimizer_of(model, **options):
    return TENGraD(model, **{**OPTIONS, **options})


def step(model, optimizer, rank, number=0):
    x, y = part_of(number, rank, 2)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(rank, **options):
    model = sharded(mlp())
    optimizer = optimizer_of(model, **options)
    for number in range(2):
        step(model, optimizer, rank, number)
    return model, optimizer


def after_the_optimizer(rank):
    model = mlp()
    optimizer = optimizer_of(model)
    step(sharded(model), optimizer, rank)


def after_a_step(rank):
    model = mlp()
    optimizer = optimizer_of(model)
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    step(sharded(model), optimizer, rank)


def in_part(rank):
    model = mlp()
    fully_shard(model[0])
    optimizer_of(model)


def but_one_parameter(rank):
    model = mlp()
    optimizer_of(fully_shard(model, ignored_params={model[2].bias}))


def parameters_without_a_model(rank):
    optimizer_of(list(sharded(mlp()).parameters()))


def parameters_of_before(rank):
    model = mlp()
    parameters = list(model.parameters())
    TENGraD(sharded(model), parameters, **OPTIONS)


def parameters_of_a_forward(rank):
    model = fully_shard(mlp())
    with torch.no_grad():
        model(batch(CASES["MLP"], 0)[0])
    TENGraD(model, list(model.parameters()), **OPTIONS)


def parameters_of_another_model(rank):
    TENGraD(mlp(), sharded(mlp()).parameters(), **OPTIONS)


def along_another_dimension(rank):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    optimizer_of(model)


def tensor_parallel(rank):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    optimizer_of(parallelize_module(mlp(), init_device_mesh("cpu", (2,)), plan))


def on_two_meshes(rank):
    model = mlp()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    optimizer_of(fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))))


def offloaded(rank):
    optimizer_of(fully_shard(mlp(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def of_own_rows(rank):
    optimizer_of(sharded(mlp()), gram="local")


def of_earlier_rows(rank):
    optimizer_of(sharded(mlp()), history=2)


def in_groups_of_one(rank):
    groups = [dist.new_group([other]) for other in range(2)]
    optimizer_of(sharded(mlp()), process_group=groups[rank])


def of_other_settings(rank):
    optimizer_of(sharded(mlp()), lr=0.1 * (rank + 1))


def with_a_rate_of_its_own(rank):
    model = sharded(mlp())
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["lr"] *= 1 + rank
    step(model, optimizer, rank)


def with_a_schedule_that_fails(rank):
    trained(rank, damping=fails_after_its_first_step(rank), refresh_every=1)


def divided_by_other_numbers(rank):
    model = sharded(mlp())
    model[0].set_gradient_divide_factor(1.0)
    step(model, optimizer_of(model), rank)


def without_samples(rank):
    model = sharded(mlp())
    optimizer = optimizer_of(model)
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    optimizer.step()


def without_a_forward(rank):
    model = sharded(mlp())
    optimizer = optimizer_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(checkpoint(self.first, x.requires_grad_(), use_reentrant=True))


def checkpointed_in_the_old_way(rank):
    model = sharded(Reentrant().double())
    step(model, optimizer_of(model), rank)


def viewed(rank):
    _, optimizer = trained(rank)
    assert optimizer.block("0").parameters == {"0.weight": slice(0, 42), "0.bias": slice(42, 49)}
    for view in (optimizer.fisher_block, optimizer.inverse_block, optimizer.scale_block):
        with pytest.raises(ValueError, match="of block '0' each process has a part"):
            view("0")
    optimizer.rows("0")


def copied(rank):
    copy.deepcopy(trained(rank))


def pickled(rank):
    pickle.dumps(trained(rank))


def of_kfac(rank):
    KFAC(sharded(mlp()))


def of_gauss_newton(rank):
    model = sharded(mlp())
    GaussNewton(model, model)


LATE = "RuntimeError: fully_shard has replaced the model's parameters since the optimizer was made"
PARTLY = "ValueError: '0.weight' is sharded, but "
BAD = {
    after_the_optimizer: LATE,
    after_a_step: LATE,
    in_part: PARTLY + "'2.weight' is not: call fully_shard(model) on the whole model too",
    but_one_parameter: PARTLY + "'2.bias' is not: call fully_shard(model) on the whole model too",
    parameters_without_a_model: "TypeError: model must be a torch.nn.Module, got list; parameters go to params=",
    parameters_of_before: "ValueError: parameter 0 is not sharded, but the model's parameters are",
    parameters_of_a_forward: "ValueError: parameter 0 is not sharded, but the model's parameters are",
    parameters_of_another_model: "ValueError: parameter 0 is sharded, but the model's parameters are not",
    along_another_dimension: "ValueError: '0.weight' has the placements (Shard(dim=1),), expected one Shard(0)",
    tensor_parallel: "ValueError: '2.weight' has the placements (Shard(dim=1),), expected one Shard(0)",
    on_two_meshes: "ValueError: the parameters are on 2 meshes, expected one",
    offloaded: "ValueError: fully_shard(offload_policy=CPUOffloadPolicy()) is not served",
    of_own_rows: "ValueError: gram='local' takes steps of each process's own samples",
    of_earlier_rows: "ValueError: history=2 keeps rows of earlier refreshes",
    of_other_settings: "ValueError: the ranks need the same model and the same settings, but differ in lr of group 0",
    with_a_rate_of_its_own: "RuntimeError: rank 1 differs from rank 0: its lr of group 0 is 0.06, that of rank 0 0.03",
    in_groups_of_one: (
        "ValueError: process_group= has the ranks [0], but the parameters are sharded among [0, 1]",
        "ValueError: process_group= has the ranks [1], but the parameters are sharded among [0, 1]",
    ),
    with_a_schedule_that_fails: (
        "RuntimeError: rank 1 could not refresh the curvature, so no rank does: ArithmeticError: no damping here",
        "ArithmeticError: no damping here",
    ),
    divided_by_other_numbers: "ValueError: fully_shard divides the gradients of different modules by 1.0 and 2",
    without_samples: "RuntimeError: the curvature is due for a refresh, but the batches of all ranks have 0 samples",
    without_a_forward: "RuntimeError: the curvature is due for a refresh, but there was no forward and backward",
    checkpointed_in_the_old_way: "ValueError: activation checkpointing with use_reentrant=True",
    viewed: "ValueError: of block '0' each process has a part",
    copied: "AssertionError: FSDP does not support deepcopy. Please use state dict",  # torch's own
    pickled: "PicklingError: Can't pickle",  # torch's own
    of_kfac: "ValueError: the parameters are DTensors",
    of_gauss_newton: "ValueError: the parameters are DTensors",
}


def refused(rank):
    """Return what each of these raises, in the order of the table: after an error the ranks are still together."""
    return [said_of(function, rank) for function in BAD]


def said_of(function, rank):
    try:
        function(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_every_rank_raises_one_error():
    said = zip(*several_processes.run(2, refused), strict=True)
    for (function, expected), own in zip(BAD.items(), said, strict=True):
        starts = expected if isinstance(expected, tuple) else (expected,) * 2
        assert all(text.startswith(start) for text, start in zip(own, starts, strict=True)), (function.__name__, own)


class RaisingLabels(FixedLabels):
    raises = False

    def sample(self, output, generator):
        if self.raises:
            raise ArithmeticError("no labels here")
        return super().sample(output, generator)


def raising_in_a_forward(rank):
    RaisingLabels.raises = rank == 1
    trained(rank, **{**of(), "likelihood": RaisingLabels()})


def test_a_rank_that_raises_in_a_forward_ends_the_others():
    other, raising = several_processes.outcomes_of(2, raising_in_a_forward)
    assert "ArithmeticError: no labels here" in raising
    assert isinstance(other, several_processes.Failure)
    assert "RuntimeError" in other
