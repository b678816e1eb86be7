"""What the hooks leave alone, and what they refuse."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tengrad_triton import TENGraD


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def batch(samples=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)


def backward(model, samples=6):
    x, y = batch(samples)
    F.cross_entropy(model(x), y).backward()


def hooks_on(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def parameters_after(model, prepare, steps=3, **options):
    """Return the parameters after some steps with ``prepare(model)`` before each forward."""
    optimizer = TENGraD(model, seed=0, refresh_every=2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        prepare(model)
        backward(model)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def eval_forward(model):
    model.eval()
    with torch.no_grad():
        model(batch()[0])
    model.train()


def backward_of_copy(model):
    twin = copy.deepcopy(model)
    backward(twin, samples=3)
    assert hooks_on(twin) == hooks_on(model)


# What a user does between two steps, none of which changes them.
DETOURS = {
    "a forward without gradients": lambda model: model(batch()[0]) if torch.is_grad_enabled() else None,
    "a forward in inference mode": lambda model: torch.inference_mode()(model)(batch()[0]),
    "an evaluation": eval_forward,
    "a deep copy, called": lambda model: copy.deepcopy(model)(batch()[0]),
    "a pickled copy, called": lambda model: pickle.loads(pickle.dumps(model))(batch()[0]),
    "a smaller batch, never stepped": backward_of_copy,
}


@pytest.mark.parametrize("detour", DETOURS)
def test_detours_do_not_change_the_steps(detour):
    plain = parameters_after(small_model(), lambda model: None, fisher="empirical")
    assert torch.equal(parameters_after(small_model(), DETOURS[detour], fisher="empirical"), plain)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_a_forward_without_backward_leaves_nothing_behind(fisher):
    model = small_model()
    optimizer = TENGraD(model, fisher=fisher)
    model(batch()[0])
    gc.collect()
    assert optimizer._capture.records == []
    backward(model)
    assert len(optimizer._capture.records) == 1


def test_hooks_stand_only_where_a_refresh_is_due():
    model = small_model()
    optimizer = TENGraD(model, refresh_every=3)
    standing = []
    for _ in range(6):
        standing.append(hooks_on(model) > 0)
        backward(model)
        optimizer.step()
    assert standing == [True, False, False, True, False, False]
    optimizer.close()
    assert hooks_on(model) == 0


def test_close_removes_the_hooks_and_a_due_step_says_so():
    model = small_model()
    optimizer = TENGraD(model)
    optimizer.close()
    assert hooks_on(model) == 0
    backward(model)
    with pytest.raises(RuntimeError, match="call model\\(inputs\\) itself"):
        optimizer.step()


def test_a_dead_optimizer_costs_nothing():
    model = small_model()
    optimizer = TENGraD(model, fisher="empirical")
    capture = optimizer._capture
    del optimizer
    gc.collect()
    backward(model)
    assert len(capture.records) == 1  # still alive through this name
    del capture
    gc.collect()
    backward(model)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_gradients_are_those_without_the_optimizer(fisher):
    bare, hooked = small_model(), small_model()
    optimizer = TENGraD(hooked, fisher=fisher)
    backward(bare)
    backward(hooked)
    assert optimizer._capture.records
    for ours, theirs in zip(hooked.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_micro_batches_are_one_batch(fisher):
    """Gradients accumulated over equal parts are those of the whole batch, and so are the rows of J."""
    whole, parts = small_model().double(), small_model().double()
    x, y = batch()
    x = x.double()
    steps = {}
    for name, model, pieces in (("whole", whole, 1), ("parts", parts, 2)):
        optimizer = TENGraD(model, fisher=fisher, likelihood=Certain(y), refresh_every=1)
        for _ in range(2):
            optimizer.zero_grad()
            for k, (xs, ys) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                Certain.offset = k * len(xs)
                (F.cross_entropy(model(xs), ys) / pieces).backward()
            optimizer.step()
        steps[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(steps["whole"], steps["parts"], rtol=1e-12, atol=1e-12)


class Certain:
    """A likelihood that always draws the labels it was given."""

    offset = 0

    def __init__(self, labels):
        self.labels = labels

    def sample(self, output, generator):
        return self.labels[self.offset : self.offset + len(output)]

    def nll(self, output, target):
        return F.cross_entropy(output, target, reduction="sum")


def test_zero_grad_forgets_the_batch_but_not_one_on_its_way():
    model = small_model()
    optimizer = TENGraD(model)
    backward(model)
    optimizer.zero_grad()
    assert optimizer._capture.records == []
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()  # a common order: forward, zero_grad, backward
    loss.backward()
    optimizer.step()
    assert optimizer._steps == 1


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class UsedTwice(nn.Module):
    """Calls a layer and also uses its weight behind its back."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.linear(self.fc(x).tanh(), self.fc.weight))


class Reshapes(nn.Module):
    """Gives a layer rows that are no samples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(x.reshape(-1, 2)).reshape(len(x), -1))


class Loose(nn.Module):
    """A parameter of its own beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) * self.scale


class Tied(nn.Module):
    """A weight of two layers, of which no rule describes one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), OwnForward(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def instance_forward():
    model = small_model()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 3
    return model


# A model, and the parameters that must take the plain SGD step, with a piece of the reason.
UNCOVERED = {
    "own forward": (lambda: nn.Sequential(OwnForward(4, 3)), ["0.weight", "0.bias"], "its own forward"),
    "forward replaced on the instance": (instance_forward, ["0.weight", "0.bias"], "its own forward"),
    "parametrized": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 3))),
        ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
        "parametrized",
    ),
    "loose parameter": (Loose, ["scale"], "no rule for Loose"),
    "used outside of its layer": (UsedTwice, ["fc.weight", "fc.bias"], "used outside"),
    "rows that are no samples": (Reshapes, ["fc.weight", "fc.bias"], "12 entries in dimension 0 where the batch has 6 samples"),
    "shared with a layer without a rule": (Tied, ["first.weight", "first.bias", "second.bias"], "its own forward"),
}


def first_step(model, **settings):
    optimizer = TENGraD(model, **settings)
    backward(model)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_no_rule_covers_takes_the_plain_sgd_step(case):
    make, expected, reason = UNCOVERED[case]
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    if case == "forward replaced on the instance":
        twin = make()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    with pytest.warns(UserWarning, match=reason):
        optimizer = first_step(model, unsupported="sgd", nesterov=False, **settings)
    assert sorted(row.parameter for row in optimizer.summary().rows if row.block == "-") == sorted(expected)
    sgd = torch.optim.SGD(twin.parameters(), **settings)
    backward(twin)
    sgd.step()
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    for name in expected:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=0)
    backward(model)
    optimizer.step()  # warned once: a second warning would be an error here


def test_unsupported_error_refuses_at_the_constructor():
    with pytest.raises(ValueError, match=r"no exact rule covers 0 \(OwnForward has its own forward\)"):
        TENGraD(nn.Sequential(OwnForward(4, 3)), unsupported="error")


def test_an_input_written_over_is_an_error_and_changes_nothing():
    model = small_model()
    optimizer = TENGraD(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Truncates(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)[:2]


def test_an_output_with_another_batch_size_is_an_error():
    model = Truncates()
    _optimizer = TENGraD(model)
    with pytest.raises(ValueError, match="returned 2 samples for an input of 6"):
        model(batch()[0])


@pytest.mark.parametrize(
    ("likelihood", "shape", "expected"),
    [("categorical", (6, 5, 3), r"logits of shape \[N, C\]"), ("categorical", (6,), r"logits of shape \[N, C\]")],
)
def test_an_output_that_does_not_fit_the_likelihood_is_an_error(likelihood, shape, expected):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 15)

        def forward(self, x):
            return self.fc(x).flatten()[: torch.Size(shape).numel()].reshape(shape)

    model = Shaped()
    _optimizer = TENGraD(model, likelihood=likelihood)
    with pytest.raises(ValueError, match=expected):
        model(batch()[0])


def test_an_output_that_is_no_tensor_names_the_way_out():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.fc(x)}

    model = Wrapped()
    _optimizer = TENGraD(model)
    with pytest.raises(TypeError, match="an object with sample and nll"):
        model(batch()[0])
