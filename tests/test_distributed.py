"""Steps in several processes: those of one process with the whole batch, or one error on every rank."""

import pytest
import several_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import CASES, STEPS, Case, batch, bounds, made, of, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import TENGraD

TOLERANCE = 1e-10  # of the parameters after 20 steps in float64


def ranks_trained(rank, count, names):
    return {name: trained(CASES[name], rank, count) for name in names}


@pytest.mark.parametrize("count", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_take_the_step_of_one_process_with_the_whole_batch(count):
    of_ranks = several_processes.run(count, ranks_trained, count, list(CASES))
    wrong = {}
    for name in CASES:
        alone = trained(CASES[name])
        error = max((own[name] - alone).abs().max().item() for own in of_ranks)
        apart = max((own[name] - of_ranks[0][name]).abs().max().item() for own in of_ranks)
        if not error <= TOLERANCE or apart > 0:
            wrong[name] = f"{error:.1e} from one process, {apart:.1e} from each other"
    assert not wrong


def local_steps(rank, count, options):
    case = Case(options={**of(**options), "gram": "local"})
    return trained(case, rank, count)


@pytest.mark.parametrize("options", [{}, {"scaling": "none", "damping": 0.1, "momentum": 0.0}])
def test_local_rows_give_the_mean_of_the_ranks_steps(options):
    """Each rank's step is taken by an optimizer of its own, from the same gradients; then models and momenta are averaged."""
    of_ranks = several_processes.run(2, local_steps, 2, options)
    expected = mean_of_steps(Case(options=of(**options)), 2)
    assert all((own - expected).abs().max() <= TOLERANCE for own in of_ranks)


def mean_of_steps(case, count):
    """Train ``count`` copies, each with the rows of its part and the gradient of the whole batch."""
    models = [made(case) for _ in range(count)]
    optimizers = [TENGraD(model, **case.options) for model in models]
    ends = bounds(case, count)
    for step in range(STEPS):
        x, y = batch(case, step)
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            part = slice(ends[rank], ends[rank + 1])
            F.cross_entropy(model(x[part]), y[part]).backward()
        grads = [torch.stack(own).mean(0) for own in zip(*([p.grad for p in m.parameters()] for m in models), strict=True)]
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad.copy_(grad)
            optimizer.step()
        kept = [
            [x for p in m.parameters() for x in (p.detach(), *o.state[p].values())]
            for m, o in zip(models, optimizers, strict=True)
        ]
        for own in zip(*kept, strict=True):
            mean = torch.stack(own).mean(0)
            for x in own:
                x.copy_(mean)
    return torch.cat([p.detach().flatten() for p in models[0].parameters()])


def with_error(function):
    """Return the type and the message of what a call raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def of_another_model(rank):
    TENGraD(nn.Linear(3, 4 + rank))


def of_other_settings(rank):
    TENGraD(nn.Linear(3, 4), lr=0.1 * (rank + 1))


def without_average(rank):
    model = made(CASES["MLP"])
    step_of(model, TENGraD(model, **of()), rank)


def from_other_parameters(rank):
    model = made(CASES["MLP"])
    optimizer = TENGraD(model, **of())
    with torch.no_grad():
        model[0].bias += rank
    step_of(model, optimizer, rank)


def a_step_ahead(rank):
    model = made(CASES["MLP"])
    called = DistributedDataParallel(model)
    optimizer = TENGraD(called, **of())
    if rank:
        state = optimizer.state_dict()
        state["tengrad"]["steps"] = 5
        optimizer.load_state_dict(state)
    step_of(called, optimizer, rank)


def without_a_forward(rank):
    model = made(CASES["MLP"])
    optimizer = TENGraD(model, **of())
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(model(x), y).backward()
    if rank:
        optimizer._capture.forget()
    optimizer.step()


def in_a_smaller_group(rank):
    model = made(CASES["MLP"])
    optimizer = TENGraD(model, **of())
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(model(x), y).backward()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    optimizer.step()


def without_samples(rank):
    model = made(CASES["MLP"])
    called = DistributedDataParallel(model)
    optimizer = TENGraD(called, **of())
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(called(x[:0]), y[:0], reduction="sum").backward()
    optimizer.step()


def with_batch_norm_of_all_ranks(rank):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    optimizer = TENGraD(model, **of())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def with_sharded_parameters(rank):
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    TENGraD(model)


def with_some_sharded_parameters(rank):
    whole, sharded = nn.Linear(4, 4), nn.Linear(4, 4)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    TENGraD(whole, sharded.parameters())


def step_of(model, optimizer, rank):
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(model(x[8 * rank : 8 * rank + 8]), y[8 * rank : 8 * rank + 8]).backward()
    optimizer.step()


OTHER = "ValueError: the ranks need the same model and the same settings, but differ in "
BAD = {
    of_another_model: OTHER + "parameter 'weight': (4, 3) torch.float32 True on rank 0, (5, 3)",
    of_other_settings: OTHER + "lr of group 0: 0.1 on rank 0, 0.2 on rank 1",
    without_average: "RuntimeError: rank 1 differs from rank 0: the sizes of its gradients add up to",
    from_other_parameters: "RuntimeError: rank 1 differs from rank 0: the sizes of its parameters add up to",
    a_step_ahead: "RuntimeError: rank 1 differs from rank 0: it has taken 5 steps, and rank 0 0",
    without_a_forward: (
        "RuntimeError: rank 1 could not refresh the curvature, so no rank does: RuntimeError: the curvature is due",
        "RuntimeError: the curvature is due for a refresh, but there was no forward",
    ),
    in_a_smaller_group: "RuntimeError: the process group has 1 ranks, but had 2 when the optimizer was made",
    without_samples: "RuntimeError: the curvature is due for a refresh, but the batches of all ranks have 0 samples",
    with_batch_norm_of_all_ranks: "ValueError: the SyncBatchNorm '1' is in training",
    with_sharded_parameters: "ValueError: the parameters are DTensors",
    with_some_sharded_parameters: "ValueError: the parameters are DTensors",
}


def refused(rank, function):
    return with_error(lambda: function(rank))


@pytest.mark.parametrize("function", BAD, ids=lambda function: function.__name__)
def test_every_rank_raises_one_error(function):
    expected = BAD[function] if isinstance(BAD[function], tuple) else (BAD[function],) * 2
    said = several_processes.run(2, refused, function)
    assert all((own or "nothing").startswith(start) for own, start in zip(said, expected, strict=True)), said
