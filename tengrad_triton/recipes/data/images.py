"""Images and labels in memory, and their batches.

Key: N images, C channels, H height, W width; C11 is broadcast over an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

Part = Literal["train", "test"]


@dataclass(frozen=True)
class Split:
    """Images in uint8 and their labels. A batch is normalized when it is taken: float32 takes four times the memory."""

    images: Tensor  # NCHW
    labels: Tensor  # N

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        """Return the same images and labels on ``device``."""
        return type(self)(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Normalizer:
    """The mean and standard deviation of each channel of a training set, in the units of its pixels."""

    mean: Tensor  # C11
    std: Tensor  # C11

    @classmethod
    def of(cls, split: Split) -> Self:
        """Return the statistics of a split, from counts of the 256 pixel values, without a copy of the images."""
        channels = split.images.transpose(0, 1).flatten(1)
        counts_CV = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
        share_CV = counts_CV / counts_CV.sum(1, keepdim=True)
        value_V = torch.arange(256, dtype=torch.float64)
        mean_C1 = (share_CV * value_V).sum(1, keepdim=True)
        std_C1 = (share_CV * (value_V - mean_C1) ** 2).sum(1, keepdim=True).sqrt()
        std_C1[std_C1 == 0] = 1  # a constant channel becomes zeros, not NaN
        return cls(mean_C1[..., None].float(), std_C1[..., None].float())

    def to(self, device: torch.device) -> Self:
        """Return the same statistics on ``device``."""
        return type(self)(self.mean.to(device), self.std.to(device))

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Return images in float32; over the training set each channel has mean 0 and standard deviation 1."""
        return (images_NCHW - self.mean) / self.std


@dataclass(frozen=True)
class Data:
    """A training set, a test set, and the statistics that normalize both."""

    train: Split
    test: Split
    normalize: Normalizer
    classes: int

    def to(self, device: torch.device) -> Self:
        """Return the same data on ``device``."""
        return type(self)(self.train.to(device), self.test.to(device), self.normalize.to(device), self.classes)

    def batches(self, part: Part, size: int, shuffle_seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of normalized images and their labels.

        The order depends on ``shuffle_seed`` alone; without it, it is that of the file. The last batch may be smaller.
        """
        split = self.train if part == "train" else self.test
        order_N = torch.arange(len(split))
        if shuffle_seed is not None:
            order_N = torch.randperm(len(split), generator=torch.Generator().manual_seed(shuffle_seed))
        for index in torch.split(order_N.to(split.labels.device), size):
            yield self.normalize(split.images[index]), split.labels[index]
