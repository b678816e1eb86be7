"""What a compiled step takes: nested batches, ragged ones, models that change; it is a step like any other."""

import collections
import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from input_cases import INPUTS, LOSSES, SAMPLES, batches
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import optimizer as torch_optimizer

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.compiled.signatures import Prepared, Signature, batch_signature

REFRESH = 3


def small(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, TENGraD(net, refresh_every=REFRESH, seed=0, **options)


def numbers(sizes):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 8, generator=draw, dtype=torch.float64), torch.randint(3, (size,), generator=draw))
        for size in sizes
    ]


def plain(net, optimizer, loss_fn=F.cross_entropy):
    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def compiled(net, optimizer, loss_fn=F.cross_entropy, backend="eager"):
    return compile_train_step(net, loss_fn, optimizer, backend=backend)


def assert_same(net, twin):
    for (name, p), q in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8), name


@pytest.fixture(autouse=True)
def _no_graphs():
    torch.compiler.reset()
    counters.clear()


# Tracing takes seconds, and compiling more; the rows that are not slow have every model and both Fishers.
FISHERS = ["sampled", "empirical"]
AT_ONCE = {(case, FISHERS[at % 2]) for at, case in enumerate(INPUTS)}
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
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.5e-2)


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


@pytest.mark.parametrize("case", CHANGES)
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
                warnings.filterwarnings("ignore", message=".*takes the plain step")
                step(x, y)
        ends.append(net)
    assert_same(*ends)
