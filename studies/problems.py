"""The problems of the study: five models, each with a size that trains for about ten seconds on one core.

Key: N samples, C channels, H and W pixels, S points of a stencil, T tokens, D features of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from tengrad_triton.recipes.data import registry
from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.models import conv_3c1f, mlp

BATCH, EVALUATION_BATCH = 128, 1000
FASHION, CIFAR = (1, 28, 28), (3, 32, 32)
CLASSES = 10
TRAIN_IMAGES, TEST_IMAGES = 25_600, 2_000
Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """The batches, the loss and the evaluation of a problem."""

    likelihood: str
    quality: str

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch."""

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches without end; they depend on the seed alone."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss and, by the name ``quality``, the quality of a model on test data."""


@dataclass(frozen=True)
class Problem:
    """A model, its task, and the number of training steps."""

    title: str
    build: Callable[[], nn.Module]
    task: Callable[[Path], Task]
    steps: int


@dataclass(frozen=True)
class Images:
    """Classification of images."""

    data: Data
    likelihood: str = "categorical"
    quality: str = "accuracy"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(output, target)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield shuffled images, epoch after epoch."""
        epoch = 0
        while True:
            yield from self.data.batches("train", BATCH, shuffle_seed=1000 * seed + epoch)
            epoch += 1

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss and the accuracy on the test images, and leave the model in training mode."""
        model.eval()
        loss, hits = 0.0, 0
        for x, y in self.data.batches("test", EVALUATION_BATCH):
            output = model(x)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            hits += int((output.argmax(1) == y).sum())
        model.train()
        return {"loss": loss / len(self.data.test), "accuracy": hits / len(self.data.test)}


@cache
def images(name: registry.DatasetName, folder: Path) -> Images:
    """Return the first images of a data set in a folder of Parquet files."""
    return Images(registry.load(name, folder, TRAIN_IMAGES, TEST_IMAGES, Console(quiet=True)))


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


STENCIL = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)


class Poisson(nn.Module):
    """The residual of −Δu = f on the unit square, u = 0 on its border, where u is a network times x(1−x)y(1−y).

    Δ is the five-point stencil of width h: in float64 its error, h² u'''' / 12, is far below that of the network.
    """

    def __init__(self, width: int, h: float = 1e-3) -> None:
        super().__init__()
        layers = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        self.network = nn.Sequential(*layers).double()
        self.h = h

    def solution(self, x_NS2: Tensor) -> Tensor:
        """Return u at points of the square."""
        border = (x_NS2 * (1 - x_NS2)).prod(-1)
        return 16 * border * self.network(2 * x_NS2 - 1).squeeze(-1)

    def forward(self, x_N2: Tensor) -> Tensor:
        """Return −Δu at points of the square."""
        u_NS = self.solution(x_N2[:, None] + self.h * STENCIL)
        return (4 * u_NS[:, 0] - u_NS[:, 1:].sum(1)) / self.h**2


def exact_solution(x_N2: Tensor) -> Tensor:
    """Return u = sin(πx) sin(πy) + sin(3πx) sin(2πy) / 4."""
    waves = [((1, 1), 1.0), ((3, 2), 0.25)]
    return sum((c * torch.sin(math.pi * x_N2 * torch.tensor(k)).prod(1) for k, c in waves), torch.zeros(()))


def source_term(x_N2: Tensor) -> Tensor:
    """Return f = −Δu."""
    waves = [((1, 1), 2.0), ((3, 2), 13 / 4)]
    factor = math.pi**2
    return sum((factor * c * torch.sin(math.pi * x_N2 * torch.tensor(k)).prod(1) for k, c in waves), torch.zeros(()))


@dataclass(frozen=True)
class Equation:
    """The residual of Poisson's equation at random points, new ones for every batch."""

    points: int = 256
    likelihood: str = "gaussian"
    quality: str = "error"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean square of the residual."""
        return F.mse_loss(output, target)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield points of the square, and f at these points."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            x_N2 = torch.rand(self.points, 2, dtype=torch.float64, generator=generator)
            yield x_N2, source_term(x_N2)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss, and the relative L2 error of u, on the midpoints of a 32 × 32 grid."""
        assert isinstance(model, Poisson)
        middle = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
        x_N2 = torch.cartesian_prod(middle, middle)
        u_N = exact_solution(x_N2)
        error = (model.solution(x_N2) - u_N).norm() / u_N.norm()
        return {"loss": F.mse_loss(model(x_N2), source_term(x_N2)).item(), "error": error.item()}


PROBLEMS = {
    "mlp": Problem(
        "MLP, 784-256-256-10, Fashion-MNIST",
        lambda: mlp(FASHION, CLASSES, 256),
        lambda data: images("fashion-mnist", data / "fashion_mnist"),
        600,
    ),
    "3c1f": Problem(
        "3C1F of width 8, Fashion-MNIST",
        lambda: conv_3c1f(FASHION, CLASSES, 8),
        lambda data: images("fashion-mnist", data / "fashion_mnist"),
        120,
    ),
    "resnet": Problem(
        "ResNet-8 with BatchNorm, CIFAR-10", lambda: resnet(16), lambda data: images("cifar10", data / "cifar10"), 96
    ),
    "vit": Problem(
        "vision transformer, Fashion-MNIST",
        lambda: Transformer(32, 2, 4),
        lambda data: images("fashion-mnist", data / "fashion_mnist"),
        240,
    ),
    "pinn": Problem("PINN, Poisson's equation in float64", lambda: Poisson(32), lambda data: Equation(), 800),
}
