"""In float64 every step equals the dense solve. To cover another layer or option, add a row to LAYERS."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.fisher import LIKELIHOODS

TOLERANCE = 1e-9
SETTINGS = {"lr": 0.05, "damping": 0.03, "momentum": 0.9, "weight_decay": 0.01}
SAMPLES, CLASSES = 5, 3


class Flat(nn.Module):
    """A layer, then a fixed nonlinear readout to ``CLASSES`` logits, so that the layer alone is trained."""

    def __init__(self, layer, *, between=None, calls=1):
        super().__init__()
        self.layer, self.between, self.calls = layer, between or nn.Tanh(), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.between(self.layer(x))
        flat = x.flatten(1)
        return torch.stack(
            [(flat * (k + 1 + torch.arange(flat.shape[1]).to(x)).sin()).sum(1) for k in range(CLASSES)], 1
        )


@dataclass
class Case:
    """One row: how to make the model, and the shape of one sample."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


def conv(*args, **kwargs):
    return Case(lambda: Flat(nn.Conv2d(*args, **kwargs)), (args[0], 7, 6))


class Subclass(nn.Linear):
    """Computes what Linear does."""

    def extra_repr(self):
        return "the same"


LAYERS = {
    "linear": Case(lambda: Flat(nn.Linear(4, 3)), (4,)),
    "linear without bias": Case(lambda: Flat(nn.Linear(4, 3, bias=False)), (4,)),
    "linear over tokens": Case(lambda: Flat(nn.Linear(4, 3)), (6, 4)),
    "linear over 2-d positions": Case(lambda: Flat(nn.Linear(4, 3)), (2, 3, 4)),
    "linear over many tokens": Case(lambda: Flat(nn.Linear(3, 2)), (40, 3)),
    "linear, in-place activation": Case(lambda: Flat(nn.Linear(4, 3), between=nn.ReLU(inplace=True)), (4,)),
    "linear over tokens, in-place activation": Case(
        lambda: Flat(nn.Linear(4, 3), between=nn.ReLU(inplace=True)), (6, 4)
    ),
    "linear called twice": Case(lambda: Flat(nn.Linear(4, 4), calls=2), (4,)),
    "linear over tokens called twice": Case(lambda: Flat(nn.Linear(4, 4), calls=2), (6, 4)),
    "subclass of linear": Case(lambda: Flat(Subclass(4, 3)), (4,)),
    "conv": conv(2, 3, 3),
    "conv without bias": conv(2, 3, 3, bias=False),
    "conv, rectangular kernel": conv(2, 3, (3, 2)),
    "conv, stride": conv(2, 3, 3, stride=2),
    "conv, two strides": conv(2, 3, 3, stride=(2, 3)),
    "conv, padding": conv(2, 3, 3, padding=1),
    "conv, two paddings": conv(2, 3, 3, padding=(2, 1)),
    "conv, padding same": conv(2, 3, (2, 3), padding="same"),
    "conv, padding same, dilated": conv(2, 3, 3, padding="same", dilation=(2, 1)),
    "conv, padding valid": conv(2, 3, 3, padding="valid"),
    "conv, reflect": conv(2, 3, 3, padding=1, padding_mode="reflect"),
    "conv, replicate": conv(2, 3, 3, padding=(2, 1), padding_mode="replicate"),
    "conv, circular": conv(2, 3, 3, padding=1, padding_mode="circular"),
    "conv, circular same": conv(2, 3, 3, padding="same", padding_mode="circular"),
    "conv, dilation": conv(2, 3, 2, dilation=2),
    "conv, two dilations and strides": conv(2, 3, 2, dilation=(2, 3), stride=(1, 2), padding=1),
    "conv, groups": conv(4, 6, 3, groups=2),
    "conv, depthwise": conv(4, 4, 3, groups=4, padding=1),
    "conv, depthwise with multiplier": conv(3, 6, 3, groups=3, stride=2),
    "conv, pointwise": conv(4, 3, 1),
    "conv, fewer positions than channels": Case(lambda: Flat(nn.Conv2d(6, 2, 3)), (6, 4, 4)),
    "conv, fewer positions than channels, every option": Case(
        lambda: Flat(nn.Conv2d(16, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)), (16, 5, 4)
    ),
    "conv, many positions": Case(lambda: Flat(nn.Conv2d(2, 3, 3, padding=1)), (2, 9, 8)),
    "conv, many positions, every option": Case(
        lambda: Flat(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 3), dilation=(1, 2), groups=2)), (4, 14, 13)
    ),
    "conv, many positions, depthwise": Case(lambda: Flat(nn.Conv2d(3, 6, 3, groups=3, padding=1)), (3, 8, 9)),
    "conv, in-place activation": Case(lambda: Flat(nn.Conv2d(2, 3, 3), between=nn.ReLU(inplace=True)), (2, 6, 6)),
    "conv called twice": Case(lambda: Flat(nn.Conv2d(2, 2, 3, padding=1), calls=2), (2, 5, 5)),
    "conv called twice, other sizes": Case(lambda: Flat(nn.Conv2d(2, 2, 3), calls=2), (2, 7, 7)),
    "3c1f": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(12, 7), nn.ReLU(inplace=True), nn.Linear(7, CLASSES)),
        ),
        (2, 6, 6),
    ),
}


def batches(case, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(SAMPLES, *case.shape, generator=generator, dtype=torch.float64)
        yield x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def train(case, fisher, likelihood="categorical", loss=F.cross_entropy, steps=3, **options):
    """Return parameters after ``steps`` steps with refreshes at 0 and 2, ours and the oracle's."""
    torch.manual_seed(0)
    model = case.model().double()
    twin = copy.deepcopy(model)
    recording = dense.Recording(LIKELIHOODS[likelihood])
    optimizer = TENGraD(model, refresh_every=2, fisher=fisher, likelihood=recording, **SETTINGS, **options)
    oracle = dense.DenseNGD(twin, dense.blocks_of(twin), **SETTINGS)
    for step, (x, labels) in enumerate(batches(case, steps)):
        target = labels if likelihood == "categorical" else F.one_hot(labels, CLASSES).double()
        optimizer.zero_grad()
        loss(model(x), target).backward()
        if step % 2 == 0:
            own = (recording.target, recording.nll) if fisher == "sampled" else (target, loss)
            oracle.refresh(dense.sample_gradients(twin, x, *own))
        optimizer.step()
        twin.zero_grad()
        loss(twin(x), target).backward()
        oracle.step({name: p.grad for name, p in twin.named_parameters()})
    return dict(model.named_parameters()), dict(twin.named_parameters()), optimizer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of its own forward
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("layer", LAYERS)
def test_step_equals_the_dense_solve(layer, fisher, representation):
    ours, oracle, optimizer = train(LAYERS[layer], fisher, representation=representation)
    assert dense.relative_error(ours, oracle) < TOLERANCE
    assert all(row.block != "-" for row in optimizer.summary().rows)


LOSSES = {
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_other_likelihoods(likelihood, fisher):
    ours, oracle, _ = train(LAYERS["3c1f"], fisher, likelihood, LOSSES[likelihood])
    assert dense.relative_error(ours, oracle) < TOLERANCE
