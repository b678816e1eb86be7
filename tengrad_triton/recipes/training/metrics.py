"""What a run measures: the metrics of every epoch and of every training step.

Key: S steps.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

from tengrad_triton.recipes.optimizers.settings import OptimizerName

DIVERGED_ABOVE = 1.1  # times the first loss; a smaller rise may be chance


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch of one optimizer. Losses are means over images; those of training are taken while the weights move.

    ``cpu_seconds`` is the CPU time of the process in training, which other programs do not disturb on one thread.
    """

    optimizer: OptimizerName
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    eval_seconds: float
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Steps:
    """All training steps of one optimizer, as columns in float64 on the CPU."""

    train_seconds: Tensor  # S: the host's time from the start of training to the end of the step, without evaluations
    loss: Tensor  # S: the mean over the batch, before the step
    accuracy: Tensor  # S

    @classmethod
    def of(cls, train_seconds_S: Tensor, totals_S3: Tensor) -> Self:
        """Return the means of each batch, from its [sum of the losses, right answers, images]."""
        loss_S, hits_S, images_S = totals_S3.unbind(1)
        return cls(train_seconds_S, loss_S / images_S, hits_S / images_S)

    def __len__(self) -> int:
        return len(self.loss)

    def __add__(self, later: Self) -> Self:
        return type(self)(*(torch.cat(pair) for pair in zip(self.columns, later.columns, strict=True)))

    @property
    def columns(self) -> list[Tensor]:
        """The columns, in the order of the fields."""
        return [getattr(self, column.name) for column in fields(self)]

    def durations(self) -> Tensor:
        """Return the seconds of each step, from the end of the step before it: [S]."""
        return self.train_seconds.diff(prepend=self.train_seconds.new_zeros(1))


@dataclass(frozen=True)
class Record:
    """The epochs and steps of one optimizer so far; every epoch has the same number of steps."""

    epochs: list[EpochMetrics] = field(default_factory=list)
    steps: Steps = field(default_factory=lambda: Steps(*torch.empty(3, 0, dtype=torch.float64)))

    def then(self, epoch: EpochMetrics, steps: Steps) -> Self:
        """Return the record with one more epoch."""
        return type(self)([*self.epochs, epoch], self.steps + steps)

    @property
    def train_seconds(self) -> float:
        """The seconds of training so far."""
        return sum(epoch.train_seconds for epoch in self.epochs)

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's mean loss is not finite, or every loss in it was far above the first loss."""
        if not self.epochs:
            return False
        loss_S = self.steps.loss
        last_S = loss_S[-(len(loss_S) // len(self.epochs)) :]
        return not math.isfinite(self.epochs[-1].train_loss) or bool((last_S > DIVERGED_ABOVE * loss_S[0]).all())


History = dict[OptimizerName, Record]
