"""What a compiled step takes: nested batches; and it runs step hooks as any other step does."""

import collections
import copy
import warnings
from functools import partial

import pytest
import torch
from input_cases import INPUTS, LOSSES, REFRESH, SAMPLES, assert_same, batches, compiled, numbers, plain, small
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import optimizer as torch_optimizer

from tengrad_triton import TENGraD


@pytest.fixture(autouse=True)
def _no_graphs():
    torch.compiler.reset()
    counters.clear()


# Tracing takes seconds, and compiling more; the rows that are not slow have every model and both Fishers.
FISHERS = ["sampled", "empirical"]
AT_ONCE = {(case, FISHERS[at % 2]) for at, case in enumerate(INPUTS) if at % 2 == 0}
ROWS = [
    pytest.param(case, fisher, marks=[] if (case, fisher) in AT_ONCE else [pytest.mark.slow])
    for case in INPUTS
    for fisher in FISHERS
]


@pytest.mark.parametrize(("case", "fisher"), ROWS)
def test_a_nested_batch_is_compiled_and_gives_the_plain_steps(case, fisher):
    model, x_of, y_of = INPUTS[case]
    ends = []
    backend = "aot_eager" if case in ("a dictionary", "labels in tuples") else "eager"
    for step_of in (plain, partial(compiled, backend=backend)):
        torch.manual_seed(0)
        net = model().double()
        optimizer = TENGraD(net, refresh_every=REFRESH, seed=0, fisher=fisher)
        step = step_of(net, optimizer, LOSSES[y_of])
        losses = [step(x, y).item() for x, y in batches(x_of, y_of, [SAMPLES] * 8)]
        ends.append((losses, net))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-8)
    assert_same(ends[0][1], ends[1][1])
    assert step.why_plain is None
    assert counters["stats"]["unique_graphs"] == 2


def test_another_constant_of_a_batch_is_not_taken_for_the_first_one():
    model, x_of, y_of = INPUTS["nested, with a string and None"]
    ends = []
    for step_of in (plain, compiled):
        torch.manual_seed(0)
        net = model().double()
        step = step_of(net, TENGraD(net, refresh_every=REFRESH, seed=0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a batch that takes the plain step
            for at, (x, y) in enumerate(batches(x_of, y_of, [SAMPLES] * 10)):
                step({**x, "mode": "relu" if at in (4, 8) else "tanh", "bias": 0.5 if at == 6 else None}, y)
        ends.append(net)
    assert_same(*ends)
    assert counters["stats"]["unique_graphs"] == 2


BAD_LEAVES = {
    "a mapping of another type": (lambda x, y: (collections.UserDict(x=x), y), "x is a UserDict, .*dict"),
    "an array": (
        lambda x, y: ({"x": [x, x.numpy()]}, y),
        r"x\['x'\]\[1\] is a ndarray, but a batch consists of",
    ),
    "labels": (lambda x, y: (x, (y, {1, 2})), r"y\[1\] is a set"),
    "an object": (lambda x, y: ((x, object()), y), r"x\[1\] is a object"),
}


@pytest.mark.parametrize("case", BAD_LEAVES)
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_no_batch_is_refused_before_anything_changes(case, at):
    spoil, message = BAD_LEAVES[case]
    net, optimizer = small()
    step = compiled(net, optimizer)
    data = numbers([SAMPLES] * 4)
    for x, y in data[:at]:
        step(x, y)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match=message):
        step(*spoil(*data[at]))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    step(*data[at])


def test_a_model_that_returns_no_tensor_is_refused_before_anything_changes():
    net, optimizer = small()
    net.register_forward_hook(lambda net, args, y: (y, args[0]))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match="returned a tuple, but a compiled step needs one tensor"):
        compiled(net, optimizer)(*numbers([SAMPLES])[0])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# Step hooks and schedulers


class Untraceable(nn.Module):
    """Its refreshes cannot be compiled, because a rule reads values."""

    def __init__(self):
        super().__init__()
        self.fc, self.bag = nn.Linear(8, 6), nn.EmbeddingBag(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        ids = (x[:, 0] > 0).long()
        return self.head(self.fc(x) + self.bag(ids, torch.arange(len(x))))


class Failing(nn.Module):
    """Dynamo cannot trace its forward under a refresh's hooks: it looks at the hooks of a layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.fc(x)
        if torch.compiler.is_compiling() and self.fc._forward_hooks:
            torch._dynamo.graph_break()
        return self.head(hidden.tanh())


def with_model(model):
    torch.manual_seed(0)
    net = model().double()
    return net, TENGraD(net, refresh_every=REFRESH, seed=0)


def small_refreshing():
    net, optimizer = small()
    optimizer.refresh_every = 1
    return net, optimizer


HOOKED = {
    "refresh and reuse": (small, [8] * 7),
    "every step refreshes": (small_refreshing, [8] * 5),
    "a ragged first and last batch": (small, [5, 8, 8, 8, 8, 8, 8, 3]),
    "plain refreshes": (lambda: with_model(Untraceable), [8] * 7),
    "the trace fails": (lambda: with_model(Failing), [8] * 7),
}


@pytest.mark.parametrize("case", HOOKED)
def test_every_step_runs_the_step_hooks_once_and_counts_for_schedulers(case):
    make, sizes = HOOKED[case]
    net, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    events = []

    def hook(name):
        def record(own, args, kwargs):
            assert own is optimizer
            assert all(p.grad is None for p in net.parameters())
            events.append((name, optimizer._steps))

        return record

    optimizer.register_step_pre_hook(hook("pre"))
    optimizer.register_step_post_hook(hook("post"))
    everywhere = [
        torch_optimizer.register_optimizer_step_pre_hook(hook("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(hook("global post")),
    ]
    step = compiled(net, optimizer)
    try:
        for at, (x, y) in enumerate(numbers(sizes)):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*takes? the plain step")
                step(x, y)
            scheduler.step()  # warns where no step has been counted, and a warning is an error here
            before, after = [("global pre", at), ("pre", at)], [("post", at + 1), ("global post", at + 1)]
            assert events[4 * at :] == before + after
    finally:
        for handle in everywhere:
            handle.remove()
    assert optimizer._steps == len(sizes) == scheduler.last_epoch
    assert (step.why_plain is not None) == (case in ("plain refreshes", "the trace fails"))


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_a_scheduler_that_is_made_at_any_time_sees_compiled_steps(steps_before):
    net, optimizer = small()
    step = compiled(net, optimizer)
    data = numbers([SAMPLES] * 8)
    for x, y in data[:steps_before]:
        step(x, y)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(*data[steps_before])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_a_pre_hook_that_fails_leaves_everything_as_it_was():
    net, optimizer = small()
    step = compiled(net, optimizer)
    data = numbers([SAMPLES] * 4)
    for x, y in data[:2]:
        step(x, y)
    before, steps = copy.deepcopy(net.state_dict()), optimizer._steps

    def fail(*_):
        raise KeyError("a hook")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError, match="a hook"):
        step(*data[2])
    handle.remove()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert optimizer._steps == steps
    step(*data[2])
