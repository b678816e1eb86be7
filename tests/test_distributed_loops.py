"""What loops do beside steps, in several processes: each ends as in one process with the whole batch."""

import copy
import pickle

import pytest
import several_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import CLASSES, SAMPLES, Case, Transformer, batch, made, of, sentences
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tengrad_triton import TENGraD

STEPS, TOLERANCE = 7, 1e-10
MLP = Case()
OPTIONS = of("exact")  # whose rows do not depend on how samples are distributed


def wrapped(model, count, **options):
    return DistributedDataParallel(model, **options) if count > 1 else model


def steps(called, optimizer, rank, count, before=None, after=None, first=0, last=STEPS):
    """Train; ``before`` and ``after`` are called before each forward, and between its backward and its step."""
    n = SAMPLES // count
    for step in range(first, last):
        if before is not None:
            before(step)
        x, y = (part[rank * n : rank * n + n] for part in batch(MLP, step))
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        if after is not None:
            after(step)
        optimizer.step()


def compiled_around(rank, count, **options):
    model = made(MLP)
    called = torch.compile(wrapped(model, count, **options), backend="aot_eager")
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return model


def compiled_around_a_static_graph(rank, count):
    return compiled_around(rank, count, static_graph=True)


def compiled_within(rank, count):
    model = made(MLP)
    called = wrapped(torch.compile(model, backend="aot_eager"), count)
    steps(called, TENGraD(called, **OPTIONS), rank, count)
    return model


def wrapped_after_the_optimizer(rank, count):
    model = made(MLP)
    optimizer = TENGraD(model, **OPTIONS)
    steps(wrapped(model, count), optimizer, rank, count)
    return model


def clipped(rank, count):
    model = made(MLP)
    called = wrapped(model, count)

    def clip(step):
        nn.utils.clip_grad_norm_(called.parameters(), 0.1)

    steps(called, TENGraD(called, **OPTIONS), rank, count, after=clip)
    return model


def scaled_with_an_overflow(rank, count):
    model = made(MLP)
    called, n = wrapped(model, count), SAMPLES // count
    optimizer, scaler = TENGraD(called, **OPTIONS), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = (part[rank * n : rank * n + n] for part in batch(MLP, step))
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        scaler.scale(loss * torch.inf if step == 3 and rank == 0 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model


def frozen_and_thawed(rank, count):
    model = made(MLP)
    called = wrapped(model, count, find_unused_parameters=True)

    def freeze(step):
        model[0].requires_grad_(step < 2 or step > 4)

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=freeze)
    return model


def a_group_is_added(rank, count):
    model = made(MLP)
    called = wrapped(model, count)
    optimizer = TENGraD(called, model[2].parameters(), **OPTIONS)

    def add(step):
        if step == 4:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})

    steps(called, optimizer, rank, count, before=add)
    return model


def evaluated_by_one_rank(rank, count):
    model = made(MLP)
    called = wrapped(model, count)

    def evaluate(step):
        model.eval()
        if rank == 0:
            model(batch(MLP, 99)[0])
        model.train()

    steps(called, TENGraD(called, **OPTIONS), rank, count, before=evaluate)
    return model


def copied(rank, count, copies=copy.deepcopy):
    model = made(MLP)
    called = wrapped(model, count)
    optimizer = TENGraD(called, **OPTIONS)
    steps(called, optimizer, rank, count, last=4)
    model, optimizer = copies((model, optimizer))
    steps(wrapped(model, count), optimizer, rank, count, first=4)
    return model


def pickled(rank, count):
    return copied(rank, count, lambda both: pickle.loads(pickle.dumps(both)))


def sentences_of_other_lengths(rank, count):
    """The first half of the batch has shorter sentences; one process has a micro-batch for each length."""
    case = Case(Transformer, sentences)
    model = made(case)
    called = wrapped(model, count)
    optimizer, half = TENGraD(called, **OPTIONS), SAMPLES // 2
    for step in range(STEPS):
        x, y = batch(case, step)
        parts = [(x[:half, :3], y[:half]), (x[half:], y[half:])]
        optimizer.zero_grad()
        for ids, labels in parts if count == 1 else [parts[rank]]:
            (F.cross_entropy(called(ids), labels) * count / 2).backward()
        optimizer.step()
    return model


class Named(nn.Module):
    """Returns the logits beside something else."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"hidden": hidden, "logits": self.head(hidden)}


def one_of_two_outputs(rank, count):
    model = made(Case(Named))
    called = wrapped(model, count)
    steps(lambda x: called(x)["logits"], TENGraD(called, **OPTIONS, output="logits"), rank, count)
    return model


LOOPS = [
    compiled_around,
    compiled_around_a_static_graph,
    compiled_within,
    wrapped_after_the_optimizer,
    clipped,
    scaled_with_an_overflow,
    frozen_and_thawed,
    a_group_is_added,
    evaluated_by_one_rank,
    copied,
    pickled,
    sentences_of_other_lengths,
    one_of_two_outputs,
]


def ends_of(rank, count):
    return {loop.__name__: parameters_of(loop(rank, count)) for loop in LOOPS}


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.compile, and that a frozen layer has no rows
def test_loops_in_two_processes_end_as_in_one():
    alone, (first, second) = ends_of(0, 1), several_processes.run(2, ends_of, 2)
    wrong = {name: (first[name] - alone[name]).abs().max().item() for name in alone}
    assert {name: error for name, error in wrong.items() if not error <= TOLERANCE} == {}
    assert all(torch.equal(first[name], second[name]) for name in alone)


def in_pairs(rank):
    """Train another model in each of two pairs of ranks, by a copy of its optimizer too, which a pickle cannot be."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = made(MLP)
    with torch.no_grad():
        model[0].bias += rank // 2
    called = torch.compile(DistributedDataParallel(model, process_group=groups[rank // 2]), backend="eager")
    optimizer = TENGraD(called, **OPTIONS)
    steps(called, optimizer, rank % 2, 2, last=4)
    with pytest.raises(TypeError, match=r"other than the default one cannot be pickled: save its state_dict\(\)"):
        pickle.dumps(optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    steps(DistributedDataParallel(model, process_group=groups[rank // 2]), optimizer, rank % 2, 2, first=4)
    return parameters_of(model)


def test_ranks_train_in_the_group_of_their_wrapper():
    for rank, found in enumerate(several_processes.run(4, in_pairs)):
        model = made(MLP)
        with torch.no_grad():
            model[0].bias += rank // 2
        steps(model, TENGraD(model, **OPTIONS), 0, 1)
        assert (found - parameters_of(model)).abs().max() <= TOLERANCE
