"""The models that are measured: those of the recipes, and three that the recipes do not have. All are 10-class.

Key: N samples, T tokens, D features of a token; C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.recipes.models import conv_3c1f, mlp

CLASSES = 10
VOCABULARY = 256


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, as in ResNet-18: a normalization after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )  # fmt: skip

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x_NCHW)).relu()
        return (self.norm2(self.conv2(hidden)) + self.shortcut(x_NCHW)).relu()


def resnet18() -> nn.Module:
    """Return ResNet-18 in its CIFAR form: a 3 × 3 stem without pooling. 11.17 million parameters."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [Residual(i if first else o, o, s if first else 1) for i, o, s in stages for first in (True, False)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


class PreActivation(nn.Module):
    """The block of wide residual networks: normalization and activation come before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        activated = self.norm1(x_NCHW).relu()
        hidden = self.conv2(self.norm2(self.conv1(activated)).relu())
        return hidden + (x_NCHW if self.shortcut is None else self.shortcut(activated))


def wide_resnet(depth: int = 28, widen: int = 4) -> nn.Module:
    """Return WRN-depth-widen (Zagoruyko and Komodakis 2016). WRN-28-4 has 5.87 million parameters."""
    blocks, inputs = [], 16
    for stage, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            blocks.append(PreActivation(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    tail = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, *tail)


class Layer(nn.Module):
    """A pre-norm transformer layer whose projections are plain `Linear` layers."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x_NTD: Tensor) -> Tensor:
        normed = self.norm1(x_NTD)
        split = [p(normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x_NTD = x_NTD + self.out(mixed)
        return x_NTD + self.down(F.gelu(self.up(self.norm2(x_NTD))))


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
    """Return `depth` 3 × 3 convolutions of `width` channels on 14 × 14 pixels: what is scaled."""
    channels = [1, *[width] * depth]
    layers = [
        layer
        for inputs, outputs in pairwise(channels)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(4 * width, CLASSES))


@dataclass(frozen=True)
class Model:
    """How to make a model, and what one sample of its input looks like."""

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    tokens: bool = False

    def batch(self, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a batch of random inputs and labels, always the same."""
        generator = torch.Generator().manual_seed(0)
        shape = (samples, *self.sample)
        if self.tokens:
            x = torch.randint(VOCABULARY, shape, generator=generator)
        else:
            x = torch.randn(shape, generator=generator)
        return x.to(device), torch.randint(CLASSES, (samples,), generator=generator).to(device)

    def on(self, device: torch.device) -> nn.Module:
        """Return the model on a device, with weights that are always the same."""
        torch.manual_seed(0)
        return self.build().to(device)


MODELS: dict[str, Model] = {
    "3C1F": Model(lambda: conv_3c1f((1, 28, 28), CLASSES, 128), (1, 28, 28)),
    "ResNet-18": Model(resnet18, (3, 32, 32)),
    "WRN-28-4": Model(wide_resnet, (3, 32, 32)),
    "MLP": Model(lambda: mlp((1, 28, 28), CLASSES, 512), (1, 28, 28)),
    "transformer": Model(Transformer, (64,), tokens=True),
    # Small ones, of which a run is over in a moment.
    "small 3C1F": Model(lambda: conv_3c1f((1, 14, 14), CLASSES, 32), (1, 14, 14)),
    "tiny 3C1F": Model(lambda: conv_3c1f((1, 8, 8), CLASSES, 8), (1, 8, 8)),
    "tiny transformer": Model(lambda: Transformer(tokens=8, features=32, layers=1), (8,), tokens=True),
}
