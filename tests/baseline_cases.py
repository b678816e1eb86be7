"""The baselines by name, a small convolutional model for them, and steps on batches that a seed decides."""

import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC

# Each optimizer, with settings that make every schedule of its own fall into an interval.
BASELINES = {
    "kfac": (KFAC, {"factors_every": 2}),
    "ekfac": (EKFAC, {"rescale_every": 2, "factors_every": 2}),
    "kbfgs": (KBFGS, {}),
    "kbfgsl": (KBFGSL, {"memory": 2}),
}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8), nn.ReLU()),
        nn.Linear(8, 4),
    )


def batch(seed=0, samples=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 6, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def closure_of(model, optimizer, x, y, sign=1):
    def closure():
        optimizer.zero_grad()
        loss = sign * F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def take_steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.step(closure_of(model, optimizer, *batch(step)))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
