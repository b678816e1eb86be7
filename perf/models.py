"""The models that are measured: those of the recipes, and two others. All have 10 classes.

Key: N samples, T tokens, D features of a token; C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tengrad_triton.recipes.models import conv_3c1f, image_model, mlp
from tengrad_triton.recipes.models.transformer import Layer

CLASSES = 10
VOCABULARY = 256


class Transformer(nn.Module):
    """A classifier of sequences: embeddings, layers, and the mean over the tokens."""

    def __init__(self, tokens: int = 64, features: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, features)
        self.position = nn.Embedding(tokens, features)
        self.layers = nn.Sequential(*(Layer(features, features // 32) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, CLASSES)

    def forward(self, ids_NT: Tensor) -> Tensor:
        x_NTD = self.embedding(ids_NT) + self.position.weight[: ids_NT.shape[1]]
        return self.head(self.norm(self.layers(x_NTD)).mean(1))


def convolutions(width: int, depth: int) -> nn.Module:
    """Return ``depth`` 3 × 3 convolutions of ``width`` channels on 14 × 14 pixels: the model of the scaling suite."""
    channels = [1, *[width] * depth]
    layers = [
        layer
        for inputs, outputs in pairwise(channels)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(4 * width, CLASSES))


@dataclass(frozen=True)
class Model:
    """How to build a model, and the shape of one input sample; ``tokens`` are integers; ``tiny`` is for quick runs."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    tokens: bool = False
    tiny: bool = False

    def batch(self, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch of random inputs and labels, which is the same for every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (samples, *self.sample)
        if self.tokens:
            x = torch.randint(VOCABULARY, shape, generator=generator)
        else:
            x = torch.randn(shape, generator=generator)
        return x.to(device), torch.randint(CLASSES, (samples,), generator=generator).to(device)

    def on(self, device: torch.device) -> nn.Module:
        """Return the model on a device, with the same weights for every call."""
        torch.manual_seed(0)
        return self.build().to(device)


MODELS: dict[str, Model] = {
    "3C1F": Model(lambda: conv_3c1f((1, 28, 28), CLASSES, 128), (1, 28, 28)),
    "ResNet-18": Model(lambda: image_model("resnet18").build((3, 32, 32), CLASSES), (3, 32, 32)),
    "WRN-28-4": Model(lambda: image_model("wrn-28-4").build((3, 32, 32), CLASSES), (3, 32, 32)),
    "MLP": Model(lambda: mlp((1, 28, 28), CLASSES, 512), (1, 28, 28)),
    "MLP 2048": Model(lambda: mlp((1, 28, 28), CLASSES, 2048), (1, 28, 28)),
    "transformer": Model(Transformer, (64,), tokens=True),
    # Small models, for quick runs.
    "small 3C1F": Model(lambda: conv_3c1f((1, 14, 14), CLASSES, 32), (1, 14, 14)),
    "tiny 3C1F": Model(lambda: conv_3c1f((1, 8, 8), CLASSES, 8), (1, 8, 8), tiny=True),
    "tiny transformer": Model(lambda: Transformer(tokens=8, features=32, layers=1), (8,), tokens=True, tiny=True),
}
