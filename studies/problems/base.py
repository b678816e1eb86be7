"""What a problem of the study is made of: a model, its data, its loss and what is measured on test data.

Key: N samples, C classes, T tokens of a sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from tengrad_triton.recipes.data import registry
from tengrad_triton.recipes.data.images import Data

BATCH, EVALUATION_BATCH = 128, 1000
TRAIN_IMAGES, TEST_IMAGES = 25_600, 2_000
Batch = tuple[Tensor, Tensor]
Role = Literal["choose", "judge"]
LikelihoodName = Literal["categorical", "tokens", "gaussian", "bernoulli"]


class Task(ABC):
    """The batches, the loss and the evaluation of a problem: classification by cross-entropy, unless overridden."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return F.cross_entropy(output, target)

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - most models begin with their own random weights
        """Give a new model its first weights, if they are not random."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end; they depend on the seed alone."""

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test data, the same at every call."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss and the quality on test data, and leave the model in training mode."""
        model.eval()
        loss, hits, count = 0.0, 0, 0
        for x, y in self.test_batches():
            output = model(x)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            hits += int((output.argmax(1) == y).sum())
            count += y.numel()
        model.train()
        return {"loss": loss / count, "quality": hits / count}


class Regression(Task):
    """A task whose quality is the root of the mean square error of `predict`."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean square error."""
        return F.mse_loss(output, target)

    def predict(self, output: Tensor) -> Tensor:
        """Return what is compared with the target."""
        return output

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss and the root of the mean square error on test data."""
        model.eval()
        loss, square, count = 0.0, 0.0, 0
        for x, y in self.test_batches():
            output = model(x)
            loss += self.loss(output, y).item() * y.numel()
            square += F.mse_loss(self.predict(output), y, reduction="sum").item()
            count += y.numel()
        model.train()
        return {"loss": loss / count, "quality": math.sqrt(square / count)}


@dataclass(frozen=True)
class Problem:
    """A model, its task, and how long it trains.

    Attributes:
        title: what it is, for the page.
        role: whether TENGraD's defaults may be chosen on it, or only judged.
        build: returns the model with random weights.
        task: returns the task, given the folder of the data sets.
        steps: the number of training steps.
        likelihood: of the model's output; ``tokens`` is categorical with labels [N, T] for outputs [N, C, T].
        quality: the name of what `Task.evaluate` returns beside the loss.
    """

    title: str
    role: Role
    build: Callable[[], nn.Module]
    task: Callable[[Path], Task]
    steps: int
    likelihood: LikelihoodName = "categorical"
    quality: str = "accuracy"

    @property
    def is_share(self) -> bool:
        """Whether the quality is a share, and higher is better; otherwise it is an error, and lower is better."""
        return self.quality != "error"


@cache
def load(name: registry.DatasetName, data: Path) -> Data:
    """Return the first images of a data set, given the folder of the data sets."""
    return registry.load(name, data, TRAIN_IMAGES, TEST_IMAGES, Console(quiet=True))


def epochs(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices [N] of full batches of a shuffled set, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator)[: size - size % batch].split(batch)
