"""Loops around models of `fully_shard` end as in one process with the whole batch and whole parameters."""

import warnings

import pytest
import several_processes
import sharded_loop_cases
import sharded_mesh_cases
import torch
import torch.nn.functional as F
from distributed_cases import whole
from sharded_loop_cases import OPTIONS, STEPS, wrapped
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from tengrad_triton import TENGraD

TOLERANCE = 1e-10
TOLERANCE_OF_FLOAT32 = 1e-6
ROUNDED = 1e-5  # gradients were rounded to float32, and parameters change by 0.1 to 1
LOOPS = {**sharded_loop_cases.LOOPS, **sharded_mesh_cases.LOOPS}
ALL = {**LOOPS, **sharded_mesh_cases.SLOW, **sharded_mesh_cases.IN_FOUR}


def ends_of(rank, count, names):
    """Return the parameters after each loop, or the error that it ended with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, and that a frozen layer has no rows
        return {name: end_of(ALL[name], rank, count) for name in names}


def end_of(loop, rank, count):
    try:
        model = loop(rank, count)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def wrong_loops(count, names, tolerance=TOLERANCE):
    alone, of_ranks = ends_of(0, 1, names), several_processes.run(count, ends_of, count, names)
    found = {}
    for name in names:
        ends = [alone[name], *(own[name] for own in of_ranks)]
        said = [x for x in ends if isinstance(x, str)]
        error = float("nan") if said else max((x - ends[0]).abs().max().item() for x in ends)
        if not error <= tolerance:
            found[name] = said[0] if said else f"{error:.1e}"
    return found


def test_loops_in_two_processes_end_as_in_one():
    assert wrong_loops(2, list(LOOPS)) == {}


@pytest.mark.slow
def test_slow_loops_in_two_processes_end_as_in_one():
    assert wrong_loops(2, list(sharded_mesh_cases.SLOW)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1, 2])
def test_loops_in_four_processes_end_as_in_one(first):
    names = [name for name in ALL if name != "a rank without samples"]  # which has two ranks
    assert wrong_loops(4, names[first::3]) == {}


def from_small_integers(rank, count):
    """Return the parameters after each of ten steps that begin with integers, with which bfloat16 computes exactly.

    In one process autocast takes the place of `MixedPrecisionPolicy`.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    called = wrapped(model, count, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = TENGraD(called, **{**OPTIONS, "likelihood": "gaussian"})
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in called.parameters():
                values = torch.randint(-1, 2, p.shape, generator=generator).float()
                (p.to_local() if count > 1 else p).copy_(values.chunk(count)[rank])
        x, y = (torch.randint(*ends, (8, 4), generator=generator).float() for ends in ((0, 2), (-2, 3)))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=count == 1):
            output = called(x.chunk(count)[rank])
        F.mse_loss(output.float(), y.chunk(count)[rank]).backward()
        optimizer.step()
        found.append(torch.cat([whole(p).flatten() for p in called.parameters()]))
    return torch.stack(found)


def of_one_loop(rank, count):
    return end_of(sharded_mesh_cases.accumulated_in_float32, rank, count)


def test_gradients_that_are_added_up_in_float32_change_steps_by_its_rounding():
    alone, (first, second) = of_one_loop(0, 1), several_processes.run(2, of_one_loop, 2)
    assert torch.equal(first, second)
    assert 0 < (first - alone).abs().max() <= ROUNDED


def test_parameters_in_bfloat16_take_the_steps_of_one_process_with_autocast():
    torch.manual_seed(0)
    alone = from_small_integers(0, 1)
    for own in several_processes.run(2, from_small_integers, 2):
        assert (own - alone).abs().max() <= TOLERANCE_OF_FLOAT32
