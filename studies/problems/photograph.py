"""Regression with a deep network: the colour of a photograph at a point.

Key: N points, F features of a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import Batch, Problem, Regression

OCTAVES = 5
POINTS = 512  # in a batch
HELD_OUT = 17  # every 17th pixel is for tests: prime to the width of the photograph, so that they lie in all columns


def network(width: int = 128, depth: int = 6) -> nn.Module:
    """Return ``depth`` hidden layers with tanh, from the features of a point to red, green and blue."""
    layers: list[nn.Module] = [nn.Linear(2 + 4 * OCTAVES, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def features(x_N2: Tensor) -> Tensor:
    """Return the coordinates, and their sine and cosine in octaves (Mildenhall et al. 2020): [N, F]."""
    waves = [f(2**octave * math.pi * x_N2) for octave in range(OCTAVES) for f in (torch.sin, torch.cos)]
    return torch.cat([x_N2, *waves], 1)


@dataclass(frozen=True)
class Photograph(Regression):
    """The pixels of a photograph: their coordinates in [-1, 1] and their colours in [-1, 1]."""

    x_N2: Tensor
    y_N3: Tensor

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield random pixels that are not held out."""
        generator = torch.Generator().manual_seed(seed)
        train_N = torch.arange(len(self.x_N2))
        train_N = train_N[train_N % HELD_OUT != 0]
        while True:
            index_N = train_N[torch.randint(len(train_N), (POINTS,), generator=generator)]
            yield features(self.x_N2[index_N]), self.y_N3[index_N]

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield the pixels that are held out."""
        for x_N2, y_N3 in zip(self.x_N2[::HELD_OUT].split(4000), self.y_N3[::HELD_OUT].split(4000), strict=True):
            yield features(x_N2), y_N3


@cache
def photograph() -> Photograph:
    """Return the photograph of a flower that ships with scikit-learn, 427 × 640 pixels."""
    from sklearn.datasets import load_sample_image  # noqa: PLC0415 - takes a second

    pixels_HW3 = torch.tensor(load_sample_image("flower.jpg"))
    height, width, _ = pixels_HW3.shape
    x_N2 = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    return Photograph(x_N2, pixels_HW3.reshape(-1, 3) / 127.5 - 1)


PROBLEM = Problem(
    "regression, 6 hidden layers of 128, colours of a photograph",
    "judge",
    build=network,
    task=lambda data: photograph(),
    steps=2000,
    likelihood="gaussian",
    quality="error",
)
