"""Parameters without rows take the SGD step, and inputs and outputs that do not fit are errors."""

import copy

import layer_cases as cases
import pytest
import torch
import torch.nn.functional as F
from small_mlp import backward, batch, small_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tengrad_triton import TENGraD


class Loose(nn.Module):
    """A layer, and a parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) * self.scale


class Tied(nn.Module):
    """Two layers that share a weight; no rule covers the second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), cases.OwnForward(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def instance_forward():
    model = small_model()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 3
    return model


# A model, the parameters that must take the SGD step, and a part of the reason that the warning gives.
UNCOVERED = {
    "own forward": (lambda: nn.Sequential(cases.OwnForward(4, 3)), ["0.weight", "0.bias"], "its own forward"),
    "forward replaced on the instance": (instance_forward, ["0.weight", "0.bias"], "its own forward"),
    "parametrized": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 3))),
        ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
        "parametrized",
    ),
    "loose parameter": (Loose, ["scale"], "no rule for Loose"),
    "used outside of its layer": (cases.Outside, ["fc.weight", "fc.bias"], "used outside"),
    "a batch of other things than samples": (
        cases.Reshapes,
        ["fc.weight", "fc.bias"],
        "12 entries in dimension 0 where the batch has 6 samples",
    ),
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
        optimizer = first_step(model, unsupported="sgd", nesterov=False, scaling="none", **settings)
    assert sorted(row.parameter for row in optimizer.summary().parameters if row.block == "-") == sorted(expected)
    sgd = torch.optim.SGD(twin.parameters(), **settings)
    backward(twin)
    sgd.step()
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    for name in expected:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=0)
    backward(model)
    optimizer.step()  # warned once: a second warning would be an error here


def test_unsupported_error_refuses_at_the_constructor():
    with pytest.raises(ValueError, match=r"no exact rows for 0 \(OwnForward has its own forward\)"):
        TENGraD(nn.Sequential(cases.OwnForward(4, 3)), unsupported="error")


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
            return {"first": self.fc(x), "second": self.fc(2 * x)}

    model = Wrapped()
    _optimizer = TENGraD(model)
    with pytest.raises(TypeError, match="an object with sample and nll"):
        model(batch()[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
def test_a_compiled_graph_that_gives_its_buffers_away_is_refused():
    """What docs/compatibility.md has with the setting: without it a refresh names the setting, and nothing moves."""
    torch._dynamo.reset()
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
        nn.Linear(64, 3),
    )
    compiled, optimizer = torch.compile(model, backend="aot_eager"), TENGraD(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer = False before the first call"
    ):
        F.cross_entropy(compiled(torch.randn(8, 3, 8, 8)), torch.arange(8) % 3).backward()
    assert all(map(torch.equal, before, model.parameters()))
    del optimizer
    torch._dynamo.reset()
