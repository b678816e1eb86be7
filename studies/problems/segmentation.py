"""Segmentation: garments of Fashion-MNIST on a canvas; the label of a pixel is the kind of its garment, or nothing.

Key: N samples, C channels or classes, H and W pixels, T pixels of a canvas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import Batch, Problem, Task, load
from tengrad_triton.recipes.data.images import Data, Split

CANVAS, GARMENT = 32, 14
CANVASES, TEST_CANVASES, EVALUATED = 32, 256, 64  # in a batch, in the test set, in a batch of the test set
GARMENTS = 3  # on a canvas, at half of their size; a later one covers an earlier one
KINDS = torch.tensor([1, 2, 1, 1, 1, 3, 1, 3, 4, 3])  # tops and dresses, trousers, shoes and bags, by the data's labels
CLASSES = 5  # 0 is the background
VISIBLE = 25  # darker pixels are background


class Block(nn.Sequential):
    """Two 3 × 3 convolutions, each with a group normalization."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with two levels below the first."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = Block(1, width), Block(width, 2 * width)
        self.bottom = Block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = Block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join1 = Block(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the logits of each pixel: [N, C, T]."""
        first = self.down1(x_NCHW)
        second = self.down2(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        second = self.join2(torch.cat([second, self.up2(bottom)], 1))
        first = self.join1(torch.cat([first, self.up1(second)], 1))
        return self.head(first).flatten(2)


@dataclass(frozen=True)
class Segmentation(Task):
    """Canvases with garments at random places, new ones for every batch."""

    data: Data

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield canvases [N, 1, H, W] and the labels of their pixels [N, T]."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield canvases(self.data.train, CANVASES, generator)

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield canvases with test images."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(TEST_CANVASES // EVALUATED):
            yield canvases(self.data.test, EVALUATED, generator)

    @override
    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss, and the mean over the classes of intersection over union."""
        model.eval()
        loss, confusion_CC = 0.0, torch.zeros(CLASSES * CLASSES, dtype=torch.long)
        for x_NCHW, y_NT in self.test_batches():
            output_NCT = model(x_NCHW)
            loss += F.cross_entropy(output_NCT, y_NT, reduction="sum").item()
            pairs = CLASSES * y_NT + output_NCT.argmax(1)
            confusion_CC += torch.bincount(pairs.flatten(), minlength=CLASSES * CLASSES)
        model.train()
        counts_CC = confusion_CC.view(CLASSES, CLASSES)
        both_C = counts_CC.diagonal()
        either_C = counts_CC.sum(0) + counts_CC.sum(1) - both_C
        return {"loss": loss / int(counts_CC.sum()), "quality": (both_C / either_C.clamp(min=1)).mean().item()}


def canvases(split: Split, count: int, generator: torch.Generator) -> Batch:
    """Return canvases [N, 1, H, W], with pixels of about unit scale, and the labels of their pixels [N, T]."""
    x_NHW = torch.zeros(count, CANVAS, CANVAS)
    y_NHW = torch.zeros(count, CANVAS, CANVAS, dtype=torch.long)
    for _ in range(GARMENTS):
        index_N = torch.randint(len(split), (count,), generator=generator)
        garments_NHW = F.avg_pool2d(split.images[index_N, 0].float(), 2)
        places_N2 = torch.randint(CANVAS - GARMENT + 1, (count, 2), generator=generator)
        for n, (top, left) in enumerate(places_N2.tolist()):
            garment_HW = garments_NHW[n]
            visible_HW = garment_HW > VISIBLE
            window = (n, slice(top, top + GARMENT), slice(left, left + GARMENT))
            x_NHW[window] = torch.where(visible_HW, garment_HW / 255, x_NHW[window])
            y_NHW[window] = torch.where(visible_HW, KINDS[split.labels[index_N[n]]], y_NHW[window])
    return 2 * x_NHW[:, None], y_NHW.flatten(1)


PROBLEM = Problem(
    "U-Net with GroupNorm, four kinds of garments of Fashion-MNIST on a canvas",
    "judge",
    build=UNet,
    task=lambda data: Segmentation(load("fashion-mnist", data)),
    steps=200,
    likelihood="tokens",
    quality="IoU",
)
