"""A small multilayer perceptron, a batch for it, and one backward pass."""

import torch
import torch.nn.functional as F
from torch import nn


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def batch(samples=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)


def backward(model, samples=6):
    x, y = batch(samples)
    F.cross_entropy(model(x), y).backward()
