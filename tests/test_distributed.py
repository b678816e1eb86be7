"""Steps in several processes: those of one process with the whole batch, or one error on every rank."""

import warnings
from dataclasses import replace

import pytest
import several_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import CASES, STEPS, Case, batch, bounds, made, of, trained, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import LevenbergMarquardt, TENGraD, compile_train_step
from tengrad_triton.optim.state.packed import unpacked_of

TOLERANCE = 1e-10  # of the parameters after 20 steps in float64


def ranks_trained(rank, count, names):
    return {name: trained(CASES[name], rank, count) for name in names}


@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
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
    """An optimizer of its own takes each rank's step, from the same gradients; then models and momenta are averaged."""
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
        grads = [
            torch.stack(own).mean(0) for own in zip(*([p.grad for p in m.parameters()] for m in models), strict=True)
        ]
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad.copy_(grad)
            optimizer.step()
        kept = [
            [x for p in m.parameters() for x in (p.detach(), o.state[p]["momentum_buffer"])]
            for m, o in zip(models, optimizers, strict=True)
        ]
        for own in zip(*kept, strict=True):
            mean = torch.stack(own).mean(0)
            for x in own:
                x.copy_(mean)
    return torch.cat([p.detach().flatten() for p in models[0].parameters()])


def with_a_restart(rank, pause):
    """Train for ten steps with labels of each rank's own; after ``pause`` of them, with what rank 0 has saved."""
    case = replace(CASES["MLP"], options={**of(), "likelihood": "categorical", "refresh_every": 2})
    called = wrapped(case, 2)
    optimizer = TENGraD(called, **case.options)
    trained(case, rank, 2, pause, called, optimizer)
    saved = [{"model": called.module.state_dict(), "optimizer": optimizer.state_dict()} if rank == 0 else None]
    dist.broadcast_object_list(saved)
    torch.manual_seed(rank)
    called = wrapped(case, 2)
    again = TENGraD(called, **{**case.options, "seed": 7})
    called.module.load_state_dict(saved[0]["model"])
    again.load_state_dict(saved[0]["optimizer"])
    return trained(case, rank, 2, 10 - pause, called, again, first=pause)


def first_labels(rank):
    optimizer = TENGraD(nn.Linear(3, 4), seed=0)
    return torch.rand(8, generator=optimizer._generator)


def test_each_rank_draws_labels_of_its_own():
    first, second = several_processes.run(2, first_labels)
    assert not (first == second).any()


@pytest.mark.parametrize("pause", [4, 5])
def test_a_restart_from_the_first_ranks_file_changes_nothing(pause):
    whole, resumed = (several_processes.run(2, with_a_restart, steps) for steps in (10, pause))
    assert all(torch.equal(x, whole[0]) for x in (*whole, *resumed))


def state_after(rank, count, name, steps):
    case = CASES[name]
    model = made(case)
    called = wrapped(case, count, model)
    optimizer = TENGraD(called, **case.options)
    trained(case, rank, count, steps, called, optimizer)
    return model.state_dict(), optimizer.state_dict()


def continued(rank, count, name, first, state):
    case = CASES[name]
    model = made(case)
    called = wrapped(case, count, model)
    optimizer = TENGraD(called, **case.options)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return trained(case, rank, count, STEPS - first, called, optimizer, first)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2), (1, 2)])
def test_a_state_loads_into_another_number_of_ranks(before, after):
    name = "transformer, tied weights"
    state = several_processes.run(before, state_after, before, name, 7)[0]  # in the middle of an interval
    found = several_processes.run(after, continued, after, name, 7, state)
    assert all((own - trained(CASES[name])).abs().max() <= TOLERANCE for own in found)


def compiled_steps(rank):
    model = made(CASES["MLP"])
    called = DistributedDataParallel(model)
    step = compile_train_step(called, F.cross_entropy, TENGraD(called, **of()), backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for at in range(STEPS):
            x, y = batch(CASES["MLP"], at)
            step(x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8])
    assert [str(one.message).startswith("several processes train the model") for one in said] == [True]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_compiled_step_says_why_it_is_plain_and_is_right():
    found = several_processes.run(2, compiled_steps)
    assert all((own - trained(CASES["MLP"])).abs().max() <= TOLERANCE for own in found)


def adapted_locally(rank):
    """Return what the first step with own rows predicted, the step, and the states of model and optimizer."""
    settings = {"scaling": "none", "damping": LevenbergMarquardt(0.1), "gram": "local", "blocks": "network"}
    case = Case(options=of("exact", **settings), closure=True)
    called = wrapped(case, 2)
    before = [p.detach().clone() for p in called.parameters()]
    optimizer = TENGraD(called, **case.options)
    trained(case, rank, 2, 1, called, optimizer)
    step = torch.cat([(p - old).detach().flatten() for p, old in zip(called.parameters(), before, strict=True)])
    return optimizer.stats.predicted_change, step, optimizer.state_dict()["state"][0]


def test_the_change_is_predicted_of_the_step_that_is_taken():
    (first, _, state), (second, step, _) = several_processes.run(2, adapted_locally)
    case = Case(options=of("exact"))
    model = made(case)
    x, y = batch(case, 0)
    names, values = zip(*model.named_parameters(), strict=True)

    def output(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    grads = torch.autograd.grad(F.cross_entropy(model(x), y), values)
    gradient = torch.cat([g.flatten() for g in grads])
    change = torch.func.jvp(output, values, tuple(unflattened(step, values)))[1]
    probabilities = model(x).softmax(1).detach()
    fisher = (probabilities * change**2).sum(1) - (probabilities * change).sum(1) ** 2
    expected = gradient @ step + fisher.mean() / 2
    assert first == second
    assert abs(first - expected) < 1e-9 * abs(expected)
    assert unpacked_of(state["tengrad"]["curvature"])["history"] == []  # no rows: each rank has others


def unflattened(flat, like):
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]
