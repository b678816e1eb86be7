"""The models and options that the tests of the compiled step train: twins, one plainly and one compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from tengrad_triton import TENGraD, compile_train_step

STEPS, REFRESH = 20, 4


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class Loose(nn.Module):
    """Has a parameter that no rule covers, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.scale, self.idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x) * self.scale


def convolutional(norm, *dropout):
    return nn.Sequential(
        *(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2, padding=1), norm),
        *(nn.ReLU(inplace=True), nn.Flatten(), *dropout, nn.Linear(36, 3)),
    )


MODELS = {
    "in-place activations": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "convolution, dropout": lambda: convolutional(nn.GroupNorm(2, 4), nn.Dropout(0.3)),
    "convolution, batch norm": lambda: convolutional(nn.BatchNorm2d(4)),
    "convolution, batch norm, dropout": lambda: convolutional(nn.BatchNorm2d(4, affine=False), nn.Dropout(0.3)),
    "a shared module": Twice,
    "loose parameters": Loose,
    "tokens": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ),
}
OPTIONS = {
    "sampled": {},
    "empirical": {"fisher": "empirical"},
    "nesterov, decay, schedules": {
        "nesterov": True,
        "weight_decay": 0.01,
        "damping": lambda step: 0.1 / (1 + step),
        "refresh_every": lambda step: REFRESH,
    },
}


def batches(steps, samples=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield (
            torch.randn(samples, 8, generator=generator, dtype=torch.float64),
            torch.randint(3, (samples,), generator=generator),
        )


def prepared(model, **options):
    torch.manual_seed(0)
    net = MODELS[model]().double()  # twenty steps make thousands of a rounding
    settings = {"refresh_every": REFRESH, "seed": 0, **options}
    if model == "loose parameters":
        with pytest.warns(UserWarning, match="no rule for Loose"):
            optimizer = TENGraD(net, unsupported="sgd", **settings)
    else:
        optimizer = TENGraD(net, **settings)
    return net, optimizer


def plain_steps(net, optimizer, data, scheduler=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler:
            scheduler.step()
    return losses


def compiled_steps(step, data, scheduler=None):
    losses = []
    for x, y in data:
        losses.append(step(x, y).item())
        if scheduler:
            scheduler.step()
    return losses


def compare(model, options, backend, rtol=1e-8):
    """Train twins for twenty steps under a schedule, one plainly and one compiled; return the graphs compiled."""
    torch.compiler.reset()
    counters.clear()
    (net, plain), (twin, optimizer) = prepared(model, **options), prepared(model, **options)
    losses = []
    for train in (
        lambda s: plain_steps(net, plain, batches(STEPS), s),
        lambda s: compiled_steps(
            compile_train_step(twin, F.cross_entropy, optimizer, backend=backend), batches(STEPS), s
        ),
    ):
        torch.manual_seed(7)  # dropout's
        losses.append(train(torch.optim.lr_scheduler.ExponentialLR((plain, optimizer)[len(losses)], 0.97)))
    assert losses[0] == pytest.approx(losses[1], rel=rtol)
    for (name, p), q in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=rtol, atol=rtol * p.abs().max().item()), name
    return counters["stats"]["unique_graphs"]
