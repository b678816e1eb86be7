"""What several processes are refused, and what ends them: one error on every rank."""

import os
import signal
from unittest import mock

import pytest
import several_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import CASES, batch, fails_after_its_first_step, made, of, trained, wrapped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import GaussNewton, TENGraD
from tengrad_triton.baselines import KFAC


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
        state["state"][0]["tengrad"]["steps"] = 5
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


def made_before_the_group(rank):
    model = made(CASES["MLP"])
    with mock.patch.object(dist, "is_initialized", return_value=False):
        optimizer = TENGraD(model, **of())
    step_of(DistributedDataParallel(model), optimizer, rank)


def with_a_rate_of_its_own(rank):
    case = CASES["MLP"]
    called = wrapped(case, 2)
    optimizer = TENGraD(called, **case.options)
    optimizer.param_groups[0]["lr"] *= 1 + rank
    trained(case, rank, 2, 4, called, optimizer)


def without_samples(rank):
    model = made(CASES["MLP"])
    called = DistributedDataParallel(model)
    optimizer = TENGraD(called, **of())
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(called(x[:0]), y[:0], reduction="sum").backward()
    optimizer.step()


def with_another_rate(rank):
    model = made(CASES["MLP"])
    called = DistributedDataParallel(model)
    optimizer = TENGraD(called, **of(gram="local"))
    optimizer.param_groups[0]["lr"] *= 1 + rank
    step_of(called, optimizer, rank)


def with_a_schedule_that_fails(rank):
    called = DistributedDataParallel(made(CASES["MLP"]))
    optimizer = TENGraD(called, **{**of(), "damping": fails_after_its_first_step(rank), "refresh_every": 1})
    for _ in range(2):
        optimizer.zero_grad()
        step_of(called, optimizer, rank)


def without_own_samples(rank):
    called = DistributedDataParallel(made(CASES["MLP"]))
    optimizer = TENGraD(called, **of(gram="local"))
    x, y = batch(CASES["MLP"], 0)
    F.cross_entropy(called(x[: 4 * rank]), y[: 4 * rank], reduction="sum").backward()
    optimizer.step()


def with_batch_norm_of_all_ranks(rank):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    optimizer = TENGraD(model, **of())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


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
    made_before_the_group: "RuntimeError: the process group has 2 ranks, but there was none when",
    with_a_rate_of_its_own: "RuntimeError: rank 1 differs from rank 0: its lr of group 0 is 0.06, that of rank 0 0.03",
    without_samples: "RuntimeError: the curvature is due for a refresh, but the batches of all ranks have 0 samples",
    with_another_rate: "RuntimeError: rank 1 differs from rank 0: its lr of group 0 is 0.06, that of rank 0 0.03",
    with_a_schedule_that_fails: (
        "RuntimeError: rank 1 could not refresh the curvature, so no rank does: ArithmeticError: no damping here",
        "ArithmeticError: no damping here",
    ),
    without_own_samples: (
        "RuntimeError: the curvature is due for a refresh, but the batch has 0 samples",
        "RuntimeError: rank 0 could not refresh the curvature, so no rank does: RuntimeError: the curvature is due",
    ),
    with_batch_norm_of_all_ranks: "ValueError: the SyncBatchNorm '1' is in training",
    with_some_sharded_parameters: "ValueError: parameter 0 is sharded, but the model's parameters are not",
}


def refused(rank, function):
    return with_error(lambda: function(rank))


@pytest.mark.parametrize("function", BAD, ids=lambda function: function.__name__)
def test_every_rank_raises_one_error(function):
    expected = BAD[function] if isinstance(BAD[function], tuple) else (BAD[function],) * 2
    said = several_processes.run(2, refused, function)
    assert all((own or "nothing").startswith(start) for own, start in zip(said, expected, strict=True)), said


def until_killed(rank, refreshes):
    """Return the error of a step of which the second rank does not take a part; parameters are as before."""
    case = CASES["MLP"]
    called = wrapped(case, 2)
    optimizer = TENGraD(called, **case.options)
    trained(case, rank, 2, 3 if refreshes else 4, called, optimizer)  # the curvature is refreshed at the fourth step
    before = [p.detach().clone() for p in called.parameters()]
    x, y = batch(case, 3)
    loss = F.cross_entropy(called(x), y)
    if refreshes:
        loss.backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        optimizer.step() if refreshes else loss.backward()
    except RuntimeError as error:
        assert all(map(torch.equal, before, called.parameters()))
        return f"an error: {error}"
    return "no error"


@pytest.mark.parametrize("refreshes", [True, False])
def test_a_killed_rank_ends_the_others_with_an_error(refreshes):
    survivor, killed = several_processes.outcomes_of(2, until_killed, refreshes)
    assert isinstance(killed, several_processes.Failure)
    assert survivor.startswith("an error")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: TENGraD(model, gram="whole"), "gram must be one of 'global', 'local', got 'whole'"),
        (lambda model: TENGraD(nn.DataParallel(model)), "DataParallel runs copies of the model"),
        (lambda model: KFAC(nn.DataParallel(model)), "KFAC has the samples of one process only"),
        (lambda model: GaussNewton(nn.DataParallel(model), model), "GaussNewton has the samples of one process only"),
    ],
)
def test_one_process_refuses_what_it_cannot_serve(make, said):
    with pytest.raises(ValueError, match=said):
        make(nn.Linear(3, 4))


def baselines_refused(rank):
    called = DistributedDataParallel(nn.Linear(3, 4))
    compiled = torch.compile(called)
    return [
        with_error(lambda: KFAC(called)),
        with_error(lambda: GaussNewton(called, called)),
        with_error(lambda: KFAC(compiled)),
    ]


def test_baselines_refuse_the_wrapper():
    said, _ = several_processes.run(2, baselines_refused)
    assert all("has the samples of one process only, but the model is wrapped in Distr" in text for text in said)
