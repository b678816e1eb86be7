"""A deep autoencoder of real images, by binary cross-entropy for each pixel.

Key: N samples, D pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import BATCH, EVALUATION_BATCH, Batch, Problem, Regression, epochs, load
from tengrad_triton.recipes.data.images import Data, Split

WIDTHS = (784, 256, 64, 16, 64, 256, 784)


def autoencoder(widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """Return linear layers with tanh between them; the output is logits of the pixels, and the code has no tanh."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Identity() if outputs == min(widths) else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Reconstruction(Regression):
    """Pixels in [0, 1] as inputs and as targets."""

    data: Data

    @override
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of the pixels."""
        return F.binary_cross_entropy_with_logits(output, target)

    @override
    def predict(self, output: Tensor) -> Tensor:
        """Return the pixels that the logits stand for."""
        return output.sigmoid()

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled images [N, D], epoch after epoch."""
        for index_N in epochs(len(self.data.train), BATCH, seed):
            yield _pixels(self.data.train, index_N)

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test images."""
        for start in range(0, len(self.data.test), EVALUATION_BATCH):
            yield _pixels(self.data.test, slice(start, start + EVALUATION_BATCH))


def _pixels(split: Split, index: Tensor | slice) -> Batch:
    x_ND = split.images[index].flatten(1) / 255
    return x_ND, x_ND


PROBLEM = Problem(
    "deep autoencoder, 784-256-64-16-64-256-784, Fashion-MNIST",
    "choose",
    build=autoencoder,
    task=lambda data: Reconstruction(load("fashion-mnist", data)),
    steps=1000,
    likelihood="bernoulli",
    quality="error",
)
