"""The cost of a step and the bytes of J for every layer type that has a rule, and for one that has none.

Key: N samples, T tokens, C channels; H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perf.models import CLASSES, VOCABULARY, Model
from perf.steps import measure_steps


class First(nn.Module):
    """Return the first output of a layer, whose arguments are ``inputs`` times the same tensor."""

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.inputs)[0]


class Halves(nn.Module):
    """A bilinear layer between the two halves of the features."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Bilinear(features, features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*x.chunk(2, -1))


class Own(nn.Linear):
    """A layer that no rule describes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Tied(nn.Module):
    """Embedding and head share a table; the classes are the first entries of the vocabulary."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, features), nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).mean(1)[:, :CLASSES]


def _headed(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder of the layer with a linear head, behind a pooling of its outputs to 256 numbers."""

    def build() -> nn.Module:
        return nn.Sequential(layer(), nn.Flatten(), nn.AdaptiveAvgPool1d(256), nn.Linear(256, CLASSES))

    return build


_VECTOR, _TOKENS, _LINE, _IMAGE, _VOLUME = (512,), (64, 128), (64, 256), (64, 14, 14), (16, 8, 14, 14)
_IDS = (64,)
LAYERS: Mapping[str, Model] = {
    "Linear": Model(_headed(lambda: nn.Linear(512, 512)), _VECTOR),
    "Linear, 64 tokens": Model(_headed(lambda: nn.Linear(128, 128)), _TOKENS),
    "Bilinear": Model(_headed(lambda: Halves(64, 64)), (128,)),
    "Conv1d": Model(_headed(lambda: nn.Conv1d(64, 64, 3, padding=1)), _LINE),
    "Conv2d": Model(_headed(lambda: nn.Conv2d(64, 64, 3, padding=1)), _IMAGE),
    "Conv2d, 4 groups": Model(_headed(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4)), _IMAGE),
    "Conv2d, depthwise": Model(_headed(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64)), _IMAGE),
    "Conv3d": Model(_headed(lambda: nn.Conv3d(16, 16, 3, padding=1)), _VOLUME),
    "ConvTranspose2d": Model(_headed(lambda: nn.ConvTranspose2d(64, 64, 3, padding=1)), _IMAGE),
    "Embedding": Model(_headed(lambda: nn.Embedding(20_000, 128)), _IDS, tokens=True),
    "EmbeddingBag": Model(_headed(lambda: nn.EmbeddingBag(20_000, 256)), _IDS, tokens=True),
    "LayerNorm": Model(_headed(lambda: nn.LayerNorm(128)), _TOKENS),
    "RMSNorm": Model(_headed(lambda: nn.RMSNorm(128)), _TOKENS),
    "GroupNorm": Model(_headed(lambda: nn.GroupNorm(8, 64)), _IMAGE),
    "InstanceNorm2d": Model(_headed(lambda: nn.InstanceNorm2d(64, affine=True)), _IMAGE),
    "BatchNorm2d": Model(_headed(lambda: nn.BatchNorm2d(64)), _IMAGE),
    "PReLU": Model(_headed(lambda: nn.PReLU(64)), _IMAGE),
    "MultiheadAttention": Model(_headed(lambda: First(nn.MultiheadAttention(128, 4, batch_first=True), 3)), _TOKENS),
    "RNN": Model(_headed(lambda: First(nn.RNN(128, 64, batch_first=True))), _TOKENS),
    "LSTM": Model(_headed(lambda: First(nn.LSTM(128, 64, batch_first=True))), _TOKENS),
    "GRU": Model(_headed(lambda: First(nn.GRU(128, 64, batch_first=True))), _TOKENS),
    "tied embedding and head": Model(lambda: Tied(VOCABULARY, 128), _IDS, tokens=True),
    "no rule: explicit rows": Model(_headed(lambda: Own(128, 128)), _TOKENS),
}


@dataclass(frozen=True)
class LayerCase:
    """A layer type, a batch size, and the number of rounds."""

    layer: str
    samples: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.layer}, N = {self.samples}"

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of SGD's step and of TENGraD's refresh and reuse steps, and the bytes of J."""
        return {**asdict(self), **measure_steps(LAYERS[self.layer], self.samples, self.rounds, "plain", device)}
