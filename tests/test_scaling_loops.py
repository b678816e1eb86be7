"""Scaled damping in the loops that people write: means of gradients are those of M17, and nothing else is read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from scaled import dense_d
from torch import nn

from tengrad_triton import TENGraD

SETTINGS = {"relative_damping": False, "trust_region": None, "damping": 0.3, "lr": 0.05, "seed": 0}
DRAWN = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(40, 4, dtype=torch.float64, generator=DRAWN), torch.randint(3, (40,), generator=DRAWN))
    for _ in range(12)
]


class OwnScale(nn.Module):
    """Has no rule."""

    def __init__(self, value=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((6,), value))

    def forward(self, x):
        return x * self.factor


class Tokens(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh()).mean(1)


class Heads(nn.Module):
    """Has a head that only some batches use, behind a layer of groups that only some use."""

    def __init__(self):
        super().__init__()
        self.body, self.groups = nn.Linear(4, 8), nn.Conv1d(8, 8, 1, groups=2)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)
        self.uses_second = False

    def forward(self, x):
        h = self.body(x).tanh()
        return self.second(self.groups(h[:, :, None])[:, :, 0]) if self.uses_second else self.first(h)


def perceptron(middle=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *middle, nn.Linear(6, 3)).double()


def optimizer_of(model, **options):
    return TENGraD(model, **{**SETTINGS, "scaling": "kronecker", **options})


def backward(model, optimizer, x, labels):
    optimizer.zero_grad()
    F.cross_entropy(model(x), labels).backward()


def is_finite(model):
    return all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def _uninitialized_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_uninitialized_memory_is_nan")
@pytest.mark.filterwarnings("ignore:no exact rows")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("case", ["embedding", "tied", "without rows"])
def test_no_step_reads_uninitialized_memory(case, nesterov):
    torch.manual_seed(0)
    model = perceptron([OwnScale()]) if case == "without rows" else Tokens(case == "tied").double()
    options = {"unsupported": "sgd"} if case == "without rows" else {"representation": "factored"}
    optimizer = optimizer_of(model, nesterov=nesterov, refresh_every=2, **options)
    for x, labels in DATA[:4]:
        backward(model, optimizer, x if case == "without rows" else torch.randint(7, (40, 3)), labels)
        optimizer.step()
    assert is_finite(model)


@pytest.mark.filterwarnings("ignore:no rule gave rows")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("what", ["thawed", "momentum 0 and back"])
def test_the_mean_is_that_of_gradients(what, nesterov):
    """Also of a layer that the last refresh has not seen, and where the momentum was 0 for some steps."""
    model, mean = perceptron(), 0.0
    optimizer = optimizer_of(model, nesterov=nesterov, refresh_every=100, weight_decay=0.1)
    for number, (x, labels) in enumerate(DATA):
        model[0].requires_grad_(what != "thawed" or number > 1)
        momentum = 0.0 if what != "thawed" and 4 <= number < 8 else 0.9
        optimizer.param_groups[0]["momentum"] = momentum
        backward(model, optimizer, x, labels)
        if model[0].weight.grad is not None:
            mean = momentum * mean + (1 - momentum) * model[0].weight.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", ["kronecker", "diagonal"])
@pytest.mark.parametrize("first", [(False,), (True,), (False, True)])
def test_micro_batches_of_which_some_do_not_use_a_layer(first, scaling):
    """Rows that are zero there join factors, in D of the form of the factors."""
    torch.manual_seed(0)
    model = Heads().double()
    optimizer = optimizer_of(model, scaling=scaling, refresh_every=1)
    for number in range(4):
        optimizer.zero_grad()
        batches = first if number == 0 else (False, True)
        for model.uses_second in batches:
            (F.cross_entropy(model(DATA[number][0]), DATA[number][1]) / len(batches)).backward()
        optimizer.step()
    assert is_finite(model)
    groups = optimizer._curvature.jacobians["groups"]["weight"].scale
    assert groups.rows.values_Gn.shape == (2, 4)
    assert (groups.rows.basis_Gnn is not None) == (scaling == "kronecker")


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.Flatten(), nn.Linear(36, 3)
    ),
    "tied embedding and head": lambda: Tokens(tied=True),
}  # fmt: skip


@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_half_precision(kind, how, representation):
    """D is in float32, and close to that of the same refresh in float32."""
    found = []
    for dtype in (torch.float32, torch.float32 if how == "autocast" else getattr(torch, how)):
        torch.manual_seed(0)
        model = MODELS[kind]().to(dtype)
        optimizer = optimizer_of(model, fisher="exact", refresh_every=2, representation=representation)
        for number in range(4):
            x = DATA[number][0].to(dtype)
            ids = torch.randint(7, (40, 3), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast" and len(found) > 0):
                output = model(ids if "embedding" in kind else x)
            F.cross_entropy(output.float(), DATA[number][1]).backward()
            optimizer.step()
            if number == 0:
                found.append({name: d_of(optimizer, model, name) for name, _ in model.named_parameters()})
        assert is_finite(model)
    for name, d in found[1].items():
        assert d.dtype == torch.float32
        assert (d - found[0][name]).norm() < 0.1 * found[0][name].norm(), name


def d_of(optimizer, model, name):
    """Return D of a parameter as a matrix."""
    layer, param_name = name.rsplit(".", 1)
    return dense_d(optimizer._curvature.scales[layer][param_name], model.get_parameter(name).detach().float())


def test_a_step_that_fails_in_its_solve_leaves_the_means():
    model = perceptron()
    optimizer = optimizer_of(model, refresh_every=100)
    for x, labels in DATA[:3]:
        backward(model, optimizer, x, labels)
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    class Failing:
        def __getattr__(self, name):
            raise MemoryError

    backward(model, optimizer, *DATA[3])
    optimizer._ops = Failing()
    with pytest.raises(MemoryError):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:no exact rows")
def test_steps_of_parameters_without_rows_are_bounded():
    """Their gradient is zero at the refresh, so D is small; it is not small afterwards."""
    model = perceptron([OwnScale()])
    nn.init.zeros_(model[-1].weight)
    optimizer = optimizer_of(model, unsupported="sgd", lr=1.0, refresh_every=100, momentum=0.0, clip_threshold=0.1)
    backward(model, optimizer, *DATA[0])
    optimizer.step()
    backward(model, optimizer, *DATA[1])
    before = model[2].factor.detach().clone()
    optimizer.step()
    torch.testing.assert_close((model[2].factor.detach() - before).square().mean().sqrt().item(), 0.1)


@pytest.mark.filterwarnings("ignore:no rule gave rows")
def test_steps_of_parameters_that_the_refresh_has_not_seen_are_bounded():
    model = perceptron()
    optimizer = optimizer_of(model, lr=1.0, refresh_every=100, momentum=0.0, clip_threshold=0.1, fisher="empirical")
    for number, (x, labels) in enumerate(DATA[:2]):
        model[0].requires_grad_(number > 0)
        optimizer.zero_grad()
        (1e4 * F.cross_entropy(model(x), labels)).backward()
        before = model[0].bias.detach().clone()
        optimizer.step()
    torch.testing.assert_close((model[0].bias.detach() - before).square().mean().sqrt().item(), 0.1)
