"""A small convolutional network, and plain training steps with it."""

import copy
import io

import torch
import torch.nn.functional as F
from torch import nn


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8), nn.ReLU()),
        nn.Linear(8, 4),
    )


def batch(seed=0, samples=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 6, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def take_steps(model, optimizer, first, last, scheduler=None):
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def resumed_at(pause, make, options, steps=take_steps):
    """Train for eight steps, after ``pause`` of them from a file, with other tensors and another seed."""
    model = small_model()
    optimizer = make(model, **options)
    steps(model, optimizer, 0, pause)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    torch.manual_seed(99)
    resumed = nn.Sequential(*(copy.deepcopy(layer) for layer in small_model()))
    resumed.load_state_dict(saved["model"])
    continued = make(resumed, seed=1, **options)
    continued.load_state_dict(saved["optimizer"])
    steps(resumed, continued, pause, 8)
    return resumed


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs
