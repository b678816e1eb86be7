"""A recurrent network on real sequences: the rows of an image, from the top down.

Key: N samples, T rows, F features of a row.
"""

from __future__ import annotations

from torch import Tensor, nn

from studies.problems.base import Problem, load
from studies.problems.images import CLASSES, Images


class Recurrent(nn.Module):
    """A linear layer for each row, an LSTM, and two linear layers for its last state."""

    def __init__(self, rows: int = 28, features: int = 96) -> None:
        super().__init__()
        self.embed = nn.Linear(rows, features)
        self.lstm = nn.LSTM(features, features, batch_first=True)
        self.hidden, self.head = nn.Linear(features, features), nn.Linear(features, CLASSES)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits."""
        states_NTF, _ = self.lstm(self.embed(x_NCHW.squeeze(1)).relu())
        return self.head(self.hidden(states_NTF[:, -1]).relu())


PROBLEM = Problem(
    "LSTM over the rows of an image, Fashion-MNIST",
    "judge",
    build=Recurrent,
    task=lambda data: Images(load("fashion-mnist", data)),
    steps=400,
)
