"""Ragged batches, and models that change: what a compiled step is compiled for, and that it stays the plain step."""

import warnings

import pytest
import torch
from input_cases import REFRESH, SAMPLES, assert_same, compiled, numbers, plain, small
from torch import nn
from torch._dynamo.utils import counters

from tengrad_triton import TENGraD
from tengrad_triton.compiled.signatures import Prepared, Signature, batch_signature


@pytest.fixture(autouse=True)
def _no_graphs():
    torch.compiler.reset()
    counters.clear()


# Sizes of batches. For each sequence, the sizes that are compiled for, each from the step at which it is.
SIZES = {
    "all equal": ([8] * 8, {8: 1}),
    "a ragged first one": ([5, *[8] * 9], {8: 2}),
    "ragged first and last ones": ([5, *[8] * 9, 3, *[8] * 4, 3], {8: 2}),
    "two ragged ones first": ([5, 6, *[8] * 9], {8: 3}),
    "ragged ones between": ([5, 8, 6, 8, 8, 5, 8], {8: 3}),
    "a ragged one in each second place": ([8, 3] * 7, {8: 2}),
    "another size for good": ([*[8] * 6, *[4] * 9, 8], {8: 1, 4: 7}),
    "never the same": (list(range(3, 13)), {}),
    "ever other sizes": ([3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 3], {3: 1, 4: 3, 5: 5, 6: 7}),
}


@pytest.mark.parametrize("case", SIZES)
def test_which_sizes_are_compiled_for(case):
    sizes, expected = SIZES[case]
    prepared, layers, found = Prepared(), [], {}
    for at, size in enumerate(sizes):
        signature = Signature(batch_signature(torch.empty(size, 2), [torch.empty(size)]), ())
        functions = prepared.find(signature, layers)
        if functions is None:
            prepared.put(signature, size)
        else:
            assert functions == size
            found.setdefault(size, at)
    assert found == expected


def test_nothing_is_found_that_was_prepared_for_other_layers():
    prepared, signature = Prepared(), Signature(batch_signature(torch.empty(2), torch.empty(2)), ())
    layers = []
    assert prepared.find(signature, layers) is None
    prepared.put(signature, "functions")
    assert prepared.find(signature, layers) == "functions"
    assert prepared.find(signature, []) is None


# How many graphs a sequence takes: a reuse and a refresh for each size that is compiled for, where both occur.
RUNS = {
    "a ragged first one": ([5, *[8] * 6], 2),
    "ragged first and last ones": ([5, *[8] * 7, 3, 8, 3], 2),
    "another size for good": ([*[8] * 5, *[4] * 7], 4),
    "never the same": (list(range(3, 13)), 0),
}


@pytest.mark.parametrize("case", RUNS)
def test_what_is_compiled_for_sizes_gives_the_plain_steps(case):
    sizes, graphs = RUNS[case]
    ends = []
    for step_of in (plain, compiled):
        net, optimizer = small()
        step = step_of(net, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, y in numbers(sizes):
                step(x, y)
        ends.append(net)
    assert_same(*ends)
    assert len([one for one in caught if "takes the plain step" in str(one.message)]) <= 1
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_a_process_may_compile_more_steps_than_dynamo_compiles_for_one_function():
    data = numbers([SAMPLES] * (REFRESH + 1))
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            net, optimizer = small()
            step = compiled(net, optimizer)
            for x, y in data:
                step(x, y)
            assert step.why_plain is None
    assert counters["stats"]["unique_graphs"] == 6


# Models that change while their steps are compiled


def freeze(net, optimizer):
    net[0].requires_grad_(False)


def thaw(net, optimizer):
    net.requires_grad_(True)


def look_ahead(net, optimizer):
    optimizer.param_groups[0].update(nesterov=False)


def evaluate(net, optimizer):
    net.eval()


def add_group(net, optimizer):
    optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.01})


CHANGES = {
    "frozen and thawed": ("sampled", {}, [freeze, thaw]),
    "thawed": ("empirical", {"frozen": True}, [thaw]),
    "without Nesterov": ("sampled", {}, [look_ahead]),
    "in evaluation": ("empirical", {}, [evaluate]),
    "with another group": ("sampled", {"first": True}, [add_group]),
}


AT_ONCE = ("thawed", "with another group")  # each takes Dynamo ten seconds


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in AT_ONCE else [pytest.mark.slow]) for case in CHANGES]
)
def test_a_compiled_step_follows_a_model_that_changes(case):
    fisher, how, changes = CHANGES[case]
    ends = []
    for step_of in (plain, compiled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.0), nn.Linear(6, 3)).double()
        net[0].requires_grad_(not how.get("frozen", False))
        params = net[0].parameters() if how.get("first") else None
        optimizer = TENGraD(net, params, refresh_every=REFRESH, seed=0, fisher=fisher)
        step = step_of(net, optimizer)
        data = numbers([SAMPLES] * 5 * (len(changes) + 1))
        for at, (x, y) in enumerate(data):
            if at and at % 5 == 0:
                changes[at // 5 - 1](net, optimizer)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*takes the plain step|no rule gave rows of 0 at the last")
                step(x, y)
        ends.append(net)
    assert_same(*ends)
