"""In float64 every step equals the dense solve: of every layer (`exact_cases`), and of settings of whole steps."""

import copy

import dense
import pytest
import torch
import torch.nn.functional as F
from exact_cases import CLASSES, LAYERS, TOLERANCE, Case, batches
from torch import nn

from tengrad_triton import TENGraD, canonical, compile_train_step
from tengrad_triton.likelihoods import LIKELIHOODS

SETTINGS = {"lr": 0.05, "damping": 0.03, "momentum": 0.9, "weight_decay": 0.01}
PLAIN = {"nesterov": False, "relative_damping": False, "scaling": "none", "trust_region": None}
REFRESH = 2


def train(case, fisher, likelihood="categorical", loss=F.cross_entropy, **options):
    """Return parameters after three steps with refreshes at 0 and 2, ours and the oracle's."""
    torch.manual_seed(0)
    model = case.model().double()
    twin = copy.deepcopy(model)
    recording = dense.Recording(LIKELIHOODS[likelihood])
    settings = {**SETTINGS, **PLAIN, **options}
    optimizer = TENGraD(model, refresh_every=REFRESH, fisher=fisher, likelihood=recording, **settings)
    oracle = dense.DenseNGD(twin, dense.blocks_of(twin), **SETTINGS)
    for step, (x, labels) in enumerate(batches(case, 3)):
        target = labels if likelihood == "categorical" else F.one_hot(labels, CLASSES).double()
        optimizer.zero_grad()
        loss(model(x), target).backward()
        if step % REFRESH == 0:
            own = (recording.target, recording.nll) if fisher == "sampled" else (target, loss)
            oracle.refresh(dense.sample_gradients(twin, x, *own))
        optimizer.step()
        step_densely(oracle, twin, x, target, loss)
    return dict(model.named_parameters()), dict(twin.named_parameters()), optimizer


def step_densely(oracle, twin, x, target, loss):
    twin.zero_grad()
    loss(twin(x), target).backward()
    oracle.step({name: p.grad for name, p in twin.named_parameters()})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of its own forward
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("layer", LAYERS)
def test_step_equals_the_dense_solve(layer, fisher, representation):
    ours, oracle, optimizer = train(LAYERS[layer], fisher, representation=representation)
    assert dense.relative_error(ours, oracle) < TOLERANCE
    assert all(row.block != "-" for row in optimizer.summary().parameters)


@pytest.mark.parametrize(
    ("layer", "representation"), [("linear", "factored"), ("conv", "per_sample"), ("3c1f", "auto")]
)
def test_steps_of_two_threads_equal_the_dense_solve(layer, representation, set_threads):
    """Tuned code divides its work by the number of threads; other tests have one."""
    set_threads(2)
    ours, oracle, _ = train(LAYERS[layer], "sampled", representation=representation)
    assert dense.relative_error(ours, oracle) < TOLERANCE


LOSSES = {
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_other_likelihoods(likelihood, fisher):
    ours, oracle, _ = train(LAYERS["3c1f"], fisher, likelihood, LOSSES[likelihood])
    assert dense.relative_error(ours, oracle) < TOLERANCE


def two_groups(model, first, second):
    return [{"params": model[0].parameters(), **first}, {"params": model[2].parameters(), **second}]


# Settings of whole steps: those of the first and the last layer's groups, and the optimizer's.
STEPS = {
    "two learning rates": ({"lr": 1.0}, {"lr": 0.01}, {}),
    "two learning rates, trust region": ({"lr": 1.0}, {"lr": 0.01}, {"trust_region": 1e-4}),
    "two learning rates the other way round, trust region": ({"lr": 0.01}, {"lr": 1.0}, {"trust_region": 1e-4}),
    "two learning rates in one block, trust region": (
        {"lr": 1.0},
        {"lr": 0.01},
        {"trust_region": 1e-4, "blocks": "network"},
    ),
    "two learning rates in one block, far apart, trust region": (
        {"lr": 1e-3},
        {"lr": 10.0},
        {"trust_region": 1e-4, "blocks": "network"},
    ),
    "one learning rate, trust region": ({"lr": 0.3}, {"lr": 0.3}, {"trust_region": 1e-3}),
    "a trust region that no step leaves": ({"lr": 1.0}, {"lr": 0.01}, {"trust_region": 1e9}),
}
PERCEPTRON = Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (4,))


COMPILED = ("two learning rates, trust region", "two learning rates in one block, trust region")


@pytest.mark.parametrize(
    ("setting", "compiled"),
    [*((setting, False) for setting in STEPS), *((setting, True) for setting in COMPILED)],
    ids=[*STEPS, *(f"{setting}, compiled" for setting in COMPILED)],
)
def test_steps_of_groups_equal_the_dense_solve(setting, compiled):
    first, second, options = STEPS[setting]
    torch.manual_seed(0)
    model = PERCEPTRON.model().double()
    twin = copy.deepcopy(model)
    settings = {**SETTINGS, **PLAIN, **options}
    optimizer = TENGraD(model, two_groups(model, first, second), refresh_every=REFRESH, fisher="empirical", **settings)
    blocks = dense.blocks_of(twin) if "blocks" not in options else [[name for name, _ in twin.named_parameters()]]
    lr = {name: (first if name.startswith("0.") else second)["lr"] for name, _ in twin.named_parameters()}
    oracle = dense.DenseNGD(twin, blocks, **{**SETTINGS, "lr": lr}, trust_region=settings["trust_region"])
    step_ours = compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager") if compiled else None
    for step, (x, target) in enumerate(batches(PERCEPTRON, 4)):
        if step % REFRESH == 0:
            oracle.refresh(dense.sample_gradients(twin, x, target, F.cross_entropy))
        if step_ours is None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        else:
            step_ours(x, target)
        step_densely(oracle, twin, x, target, F.cross_entropy)
    if step_ours is not None:
        assert step_ours.why_plain is None
    assert dense.relative_error(dict(model.named_parameters()), dict(twin.named_parameters())) < TOLERANCE


def test_every_rule_has_a_row_in_the_table():
    types = {type(module) for case in LAYERS.values() for module in case.model().modules()}
    rules = {rule for rule in canonical.registry if rule is not object and rule.__module__.startswith("torch.")}
    assert rules <= types, rules - types
