"""The problems whose samples are images to classify: a perceptron, 3C1F, a ResNet and a vision transformer.

Key: N samples, C channels, H and W pixels, T tokens, D features of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import BATCH, EVALUATION_BATCH, Batch, Problem, Task, load
from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.models.plain import conv_3c1f, mlp

FASHION, CIFAR = (1, 28, 28), (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Images(Task):
    """Classification of images."""

    data: Data
    batch: int = BATCH

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled images, epoch after epoch."""
        epoch = 0
        while True:
            yield from self.data.batches("train", self.batch, shuffle_seed=1000 * seed + epoch)
            epoch += 1

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test images."""
        yield from self.data.batches("test", EVALUATION_BATCH)


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, a batch normalization after each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return activations."""
        hidden = self.norm1(self.conv1(x_NCHW)).relu()
        return (self.norm2(self.conv2(hidden)) + self.shortcut(x_NCHW)).relu()


def resnet(width: int) -> nn.Module:
    """Return a ResNet-8 whose stem halves the image: three residual blocks of `width`, 2 `width` and 4 `width`."""
    stem = [nn.Conv2d(CIFAR[0], width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return tokens."""
        split = self.qkv(self.norm1(x_NTD)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_NTD = x_NTD + self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        return x_NTD + self.down(F.gelu(self.up(self.norm2(x_NTD))))


class Transformer(nn.Module):
    """A vision transformer: 16 patches of 7 × 7 pixels, and the mean over the tokens at the end."""

    def __init__(self, features: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, features, 7, 7)
        self.position = nn.Embedding(16, features)
        self.layers = nn.Sequential(*(Layer(features, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, CLASSES)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits."""
        tokens = self.patches(x_NCHW).flatten(2).mT
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self.head(self.norm(self.layers(tokens + self.position(places))).mean(1))


MLP = Problem(
    "MLP, 784-256-256-10, Fashion-MNIST",
    "choose",
    build=lambda: mlp(FASHION, CLASSES, 256),
    task=lambda data: Images(load("fashion-mnist", data)),
    steps=600,
)
CONV_3C1F = Problem(
    "3C1F of width 8, Fashion-MNIST",
    "choose",
    build=lambda: conv_3c1f(FASHION, CLASSES, 8),
    task=lambda data: Images(load("fashion-mnist", data)),
    steps=120,
)
RESNET = Problem(
    "ResNet-8 with BatchNorm, CIFAR-10",
    "choose",
    build=lambda: resnet(16),
    task=lambda data: Images(load("cifar10", data)),
    steps=96,
)
VIT = Problem(
    "vision transformer, Fashion-MNIST",
    "choose",
    build=lambda: Transformer(32, 2, 4),
    task=lambda data: Images(load("fashion-mnist", data)),
    steps=240,
)
