"""The compiled refresh, layer by layer: the plain loop's parameters in float64, or the reason why it is plain."""

import copy
import warnings
from dataclasses import replace

import dense
import layer_cases as cases
import pytest
import torch
import torch.nn.functional as F
from exact_cases import LAYERS, SAMPLES, TOLERANCE, Case, attention, batches, rnn
from torch import nn
from torch._dynamo.utils import counters

from tengrad_triton import Categorical, LevenbergMarquardt, TENGraD, canonical, compile_train_step
from tengrad_triton.compiled.functional_capture import FunctionalCapture

STEPS, REFRESH = 20, 6
VALUES = "depends on the numbers in its arguments"
CHANCE = "some rows take one backward pass for each sample"
ANOTHER = "dropout would drop other units"


class Chance(nn.Module):
    """A module without a rule that is another function each time."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.dropout(x * self.scale, 0.5, self.training)


CASES = LAYERS | {
    "attention, dropout": attention(dropout=0.5),
    "attention, called twice": attention(lambda layer, x: cases.attend(layer, cases.attend(layer, x))),
    "encoder layer, sequence first, dropout": Case(lambda: cases.SequenceFirst(0.3), (6,), 7),
    "lstm, dropout": replace(rnn(nn.LSTM, num_layers=2, dropout=0.5), shape=(2, 3)),
    "a module of its own kind, with chance": Case(lambda: nn.Sequential(Chance(), nn.Linear(4, 3)), (4,)),
    "batch norm and a dropout in attention": Case(
        lambda: nn.Sequential(nn.BatchNorm1d(6), attention(dropout=0.5).model()), (6, 4)
    ),
}
# Why a refresh takes the plain step; all others are compiled.
PLAIN = {
    "embedding bag, bags of several sizes": VALUES,
    "a module of its own kind, with chance": CHANCE,
    "batch norm and a dropout in attention": ANOTHER,
}
# One of each way of capturing, with a refresh at every step: one graph, of two.
QUICK = {
    *("bilinear", "embedding bag, weights", "attention, dropout", "attention, sequence first", "lstm, dropout"),
    *("layer norm", "weight norm", "a weight used outside of its layer", "parameters of the model's own"),
}
# With both graphs, for a refresh and for the steps that reuse its curvature; the rest of the table is slow.
REUSED = {"embedding, padding", "tied embedding and head", *PLAIN}


def _marks(layer):
    if layer == "embedding bag, bags of several sizes" and torch.__version__ < (2, 12):
        return [pytest.mark.skip(reason="torch 2.11 cannot trace slices whose lengths are data")]
    return [] if layer in REUSED else [pytest.mark.slow]


ROWS = [
    *(pytest.param(layer, 1, id=f"{layer}, every step") for layer in CASES if layer in QUICK),
    *(pytest.param(layer, REFRESH, id=layer, marks=_marks(layer)) for layer in CASES),
]


def twins(case, backend="aot_eager", **options):
    """Return parameters after a plain and a compiled training under schedules, the compiled step, and its graphs."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = case.model().double()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.05, "refresh_every": REFRESH, "seed": 0, "damping": lambda step: 0.1 / (1 + step), **options}
    plain, optimizer = TENGraD(model, **settings), TENGraD(twin, **settings)
    step = compile_train_step(twin, F.cross_entropy, optimizer, backend=backend)

    def plain_step(x, y):
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain.step()

    counters.clear()
    for one, own in ((plain_step, plain), (step, optimizer)):
        torch.manual_seed(7)  # dropout's
        schedule = torch.optim.lr_scheduler.ExponentialLR(own, 0.97)
        for x, y in batches(case, STEPS):
            one(x, y)
            schedule.step()
    assert not any("forward" in vars(module) for module in twin.modules())  # stand-ins are there for a trace only
    return dict(twin.named_parameters()), dict(model.named_parameters()), step, counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of its own forward
@pytest.mark.parametrize(("layer", "refresh_every"), ROWS)
def test_a_refresh_is_compiled_or_says_why_not(layer, refresh_every):
    """Over schedules of the learning rate and the damping: two graphs, reuse and refresh.

    There is one where no refresh is compiled, and where every step refreshes.
    """
    ours, expected, step, graphs = twins(CASES[layer], refresh_every=refresh_every)
    assert (step.why_plain is None) == (layer not in PLAIN)
    assert graphs == (1 if layer in PLAIN or refresh_every == 1 else 2)
    assert PLAIN.get(layer, "") in (step.why_plain or "")
    assert dense.relative_error(ours, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["encoder layer", "lstm", "bilinear", "weight norm", "a layer that is never called"])
def test_the_losses_own_derivatives_are_captured_alike(layer):
    ours, expected, step, graphs = twins(CASES[layer], fisher="empirical")
    assert step.why_plain is None
    assert graphs == 2
    assert dense.relative_error(ours, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize("layer", ["encoder layer, sequence first", "lstm", "parameters of the model's own"])
def test_a_compiled_refresh_under_inductor(layer):
    ours, expected, step, graphs = twins(CASES[layer], "inductor")
    assert step.why_plain is None
    assert graphs == 2
    assert dense.relative_error(ours, expected) < TOLERANCE


def test_a_layer_carries_one_hook_while_its_calls_are_captured():
    """Dynamo of torch 2.11 mistakes two hooks on one layer: no refresh of a model with batch norm could be traced."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    capture = FunctionalCapture(model, {"0": model[0], "1": model[1]}, {})
    with capture.attached({"0", "1"}, detaches=True):
        assert [len(layer._forward_hooks) for layer in model] == [1, 1, 1]
    assert not any(layer._forward_hooks for layer in model)


# Settings, and why a refresh with them takes the plain step.
SETTINGS = {
    "exact": ({"fisher": "exact"}, "one row for each sample"),
    "several draws": ({"fisher_samples": 2}, "one row for each sample"),
    "some rows": ({"fisher_rows": 3}, "one row for each sample"),
    "a history": ({"history": 2}, "one row for each sample"),
    "adapted damping": ({"damping": LevenbergMarquardt(), "trust_region": None}, "compares losses"),
    "compressed": ({"representation": "compressed"}, "depends on the data"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_setting_of_the_plain_step_is_named(settings):
    options, why = SETTINGS[settings]
    model = nn.Linear(4, 3)
    step = compile_train_step(model, F.cross_entropy, TENGraD(model, **options), backend="aot_eager")
    assert step.why_plain == "no step was taken yet"
    step(torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 3)
    assert why in step.why_plain


def test_a_likelihood_that_keeps_the_targets_is_named():
    likelihood, model, y = Categorical(), nn.Linear(4, 3), torch.arange(SAMPLES) % 3
    likelihood.target = y
    step = compile_train_step(model, F.cross_entropy, TENGraD(model, likelihood=likelihood), backend="aot_eager")
    step(torch.randn(SAMPLES, 4), y)
    assert "labels of one batch" in step.why_plain


class Looking(nn.Linear):
    """Has a rule that looks at numbers."""


@canonical.register
def _(layer: Looking, x: torch.Tensor, grad_y: torch.Tensor):
    return canonical.dispatch(nn.Linear)(layer, x, grad_y * (1 if x.sum().item() > -1e9 else 0))


def test_a_refresh_that_cannot_be_traced_is_plain_from_then_on_and_says_so_once():
    case = Case(lambda: nn.Sequential(Looking(4, 3)), (4,))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, expected, step, graphs = twins(case)
    assert sum("refreshes take the plain step" in str(one.message) for one in said) == 1
    assert "cannot be traced" in step.why_plain
    assert graphs == 1
    assert dense.relative_error(ours, expected) < TOLERANCE
