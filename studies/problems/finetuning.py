"""Fine-tuning: a network that was trained on five classes of CIFAR-10 learns the five others, with all its weights.

Key: N samples, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import BATCH, Batch, Problem, Task, epochs, load
from tengrad_triton.recipes.data.images import Data, Split

CLASSES = 5
PRETRAINING_STEPS = 300
HEAD = "head."


class Convolutional(nn.Module):
    """Three convolutions with group norm and pooling, and two linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 16, 8 * width), nn.ReLU())
        self.head = nn.Linear(8 * width, CLASSES)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(x_NCHW))


@dataclass(frozen=True)
class Classes(Task):
    """The images of the five classes from ``first`` on, with labels that count from there."""

    data: Data
    first: int

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled images, epoch after epoch."""
        chosen_N = self._chosen(self.data.train)
        for index_N in epochs(len(chosen_N), BATCH, seed):
            yield self._batch(self.data.train, chosen_N[index_N])

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test images."""
        for index_N in self._chosen(self.data.test).split(500):
            yield self._batch(self.data.test, index_N)

    def _chosen(self, split: Split) -> Tensor:
        return ((split.labels >= self.first) & (split.labels < self.first + CLASSES)).nonzero().squeeze(1)

    def _batch(self, split: Split, index_N: Tensor) -> Batch:
        return self.data.normalize(split.images[index_N]), split.labels[index_N] - self.first


class FineTuning(Classes):
    """The last five classes, for a body that was trained on the first five."""

    @override
    def prepare(self, model: nn.Module) -> None:
        """Replace the random weights of the body by trained ones; the head stays random."""
        assert isinstance(model, Convolutional)
        body = _pretrained(Classes(self.data, 0), model.body[0].out_channels)  # type: ignore[arg-type]
        model.body.load_state_dict(body)


_TRAINED: dict[tuple[int, int, int], dict[str, Tensor]] = {}


def _pretrained(task: Classes, width: int) -> dict[str, Tensor]:
    """Return the weights of a body after `PRETRAINING_STEPS` steps of AdamW: the same at every call."""
    key = (id(task.data), width, PRETRAINING_STEPS)
    if key not in _TRAINED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Convolutional(width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _, (x, y) in zip(range(PRETRAINING_STEPS), task.batches(seed=0), strict=False):
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
        _TRAINED[key] = model.body.state_dict()
    return _TRAINED[key]


@cache
def fine_tuning(data: Path) -> FineTuning:
    """Return the task, given the folder of the data sets."""
    return FineTuning(load("cifar10", data), CLASSES)


PROBLEM = Problem(
    "fine-tuning a convolutional net with GroupNorm, from five classes of CIFAR-10 to the others",
    "judge",
    build=Convolutional,
    task=fine_tuning,
    steps=96,
)
