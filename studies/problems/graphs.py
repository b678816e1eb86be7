"""A graph network: an image as points, drawn where it is bright, each joined to its nearest neighbours.

Key: N samples, T points, D features of a point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import BATCH, Batch, Problem, Task, epochs, load
from studies.problems.images import CLASSES
from tengrad_triton.recipes.data.images import Data, Split

POINTS, NEIGHBOURS = 48, 6


class Messages(nn.Module):
    """A graph layer (Hamilton et al. 2017): a point sees itself and the mean of its neighbours."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.own, self.others = nn.Linear(features, features), nn.Linear(features, features, bias=False)

    def forward(self, x_NTD: Tensor, mean_NTT: Tensor) -> Tensor:
        """Return the points after a message from their neighbours."""
        normed = self.norm(x_NTD)
        return x_NTD + (self.own(normed) + self.others(mean_NTT @ normed)).relu()


class GraphNet(nn.Module):
    """Graph layers over points, the mean over the points, and a perceptron."""

    def __init__(self, features: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(3, features)
        self.layers = nn.ModuleList(Messages(features) for _ in range(layers))
        self.hidden, self.head = nn.Linear(features, features), nn.Linear(features, CLASSES)

    def forward(self, points_NT3: Tensor) -> Tensor:
        """Return logits; a point is its two coordinates and its brightness."""
        mean_NTT = neighbours(points_NT3[..., :2])
        x_NTD = self.embed(points_NT3)
        for layer in self.layers:
            x_NTD = layer(x_NTD, mean_NTT)
        return self.head(self.hidden(x_NTD.mean(1)).relu())


def neighbours(places_NT2: Tensor) -> Tensor:
    """Return the matrix [N, T, T] that takes the mean over the nearest neighbours of each point."""
    distances_NTT = torch.cdist(places_NT2, places_NT2) + 1e3 * torch.eye(places_NT2.shape[1])
    nearest = distances_NTT.topk(NEIGHBOURS, largest=False).indices
    return torch.zeros_like(distances_NTT).scatter_(2, nearest, 1 / NEIGHBOURS)


@dataclass(frozen=True)
class Points(Task):
    """Classification of images, each by points that are drawn anew whenever it is in a batch."""

    data: Data

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield points [N, T, 3] of shuffled images, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        for index_N in epochs(len(self.data.train), BATCH, seed):
            yield points(self.data.train, index_N, generator)

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield points of the test images."""
        generator = torch.Generator().manual_seed(0)
        for index_N in torch.arange(len(self.data.test)).split(500):
            yield points(self.data.test, index_N, generator)


def points(split: Split, index_N: Tensor, generator: torch.Generator) -> Batch:
    """Draw pixels without replacement, each with a chance by its brightness; an image's labels stay its own."""
    bright_NK = split.images[index_N].flatten(1) / 255
    chosen_NT = torch.multinomial(bright_NK + 1e-4, POINTS, generator=generator)
    width = split.images.shape[-1]
    rows_NT, columns_NT = chosen_NT // width, chosen_NT % width
    places = [2 * place / (width - 1) - 1 for place in (rows_NT, columns_NT)]
    return torch.stack([*places, 2 * bright_NK.gather(1, chosen_NT) - 1], 2), split.labels[index_N]


PROBLEM = Problem(
    "graph network over 48 bright pixels, Fashion-MNIST",
    "judge",
    build=GraphNet,
    task=lambda data: Points(load("fashion-mnist", data)),
    steps=256,
)
