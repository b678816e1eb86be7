"""What nobody sets must train: an untouched TENGraD on real digits, and with a learning rate a factor of three off."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from tengrad_triton import Growing, TENGraD
from tengrad_triton.optim.options import UNSCALED

STEPS, BATCH = 60, 64
LR = {"defaults": inspect.signature(TENGraD).parameters["lr"].default, "unscaled": UNSCALED["lr"]}
MAKE = {"defaults": TENGraD, "unscaled": TENGraD.unscaled}


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def normalized():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(16, 10)),
    )


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


MODELS = {"mlp": perceptron, "convolutions": convolutions, "batch norm": normalized}


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(labels)


def losses(model, optimizer, steps, x, y):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        samples = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[samples]), y[samples])
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("factor", [1 / 3, 1, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", MAKE)
def test_an_untouched_optimizer_trains(settings, model, factor):
    """The loss never rises far above a guess's, ln 10, and ends at less than a third of it.

    With scaling the learning rate sets the length of steps; with a third of it, less than half must be left.
    """
    torch.manual_seed(0)
    net, make = MODELS[model](), MAKE[settings]
    optimizer = make(net, lr=LR[settings] * factor, seed=0) if factor != 1 else make(net, seed=0)
    seen = list(losses(net, optimizer, STEPS, *digits()))
    assert max(seen) < 1.5 * seen[0]
    assert sum(seen[-5:]) / 5 < seen[0] / (2 if settings == "defaults" and factor < 1 else 3)


@pytest.mark.parametrize("settings", MAKE)
def test_fitted_labels_leave_no_curvature_and_no_divergence(settings):
    """Where every label is certain F vanishes: a damping relative to its trace alone would vanish with it."""
    torch.manual_seed(0)
    net = perceptron()
    x, y = digits()
    seen = list(losses(net, MAKE[settings](net, seed=0), 200, x[:128], y[:128]))
    assert sum(seen[-20:]) / 20 < 0.1 * seen[0]


@pytest.mark.parametrize(("settings", "expected"), [({}, True), ({"momentum": 0.0}, False), ({"spring": 0.9}, False)])
def test_looks_ahead_where_there_is_momentum(settings, expected):
    assert TENGraD(perceptron(), **settings).param_groups[0]["nesterov"] is expected


def test_growing_interval():
    """The steps at which the optimizer itself refreshes, and those that `Growing` foretells."""
    net, refreshed = perceptron(), []
    x, y = digits()
    optimizer = TENGraD(net, seed=0)
    for step in range(85):
        before = optimizer._curvature
        optimizer.zero_grad()
        F.cross_entropy(net(x[:8]), y[:8]).backward()
        optimizer.step()
        if optimizer._curvature is not before:
            refreshed.append(step)
    assert refreshed == [0, 1, 2, 3, 4, 5, 7, 10, 14, 20, 29, 43, 63, 83]
    assert Growing().refreshes(85) == refreshed
    assert Growing(3).refreshes(13) == [0, 1, 2, 3, 4, 5, 7, 10]
    with pytest.raises(ValueError, match="most must be at least 1 step, got 0"):
        Growing(0)
    for most in (2.5, True, "x", float("inf")):
        with pytest.raises(TypeError, match=f"most must be a whole number of steps, got {most!r}"):
            Growing(most)
