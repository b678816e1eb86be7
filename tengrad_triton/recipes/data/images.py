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
    """Images as uint8, normalized a batch at a time: in float32 they would take four times the memory."""

    images: Tensor  # NCHW
    labels: Tensor  # N

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        """Return the same images and labels on `device`."""
        return type(self)(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Normalizer:
    """The mean and standard deviation of each channel of a training set, in the units of its pixels."""

    mean: Tensor  # C11
    std: Tensor  # C11

    @classmethod
    def of(cls, split: Split) -> Self:
        """Count the 256 pixel values: exact, and no second copy of the images is made."""
        channels = split.images.transpose(0, 1).flatten(1)
        counts_CV = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
        share_CV = counts_CV / counts_CV.sum(1, keepdim=True)
        value_V = torch.arange(256, dtype=torch.float64)
        mean_C1 = (share_CV * value_V).sum(1, keepdim=True)
        std_C1 = (share_CV * (value_V - mean_C1) ** 2).sum(1, keepdim=True).sqrt()
        std_C1[std_C1 == 0] = 1  # a constant channel carries nothing: zeros, not NaN
        return cls(mean_C1[..., None].float(), std_C1[..., None].float())

    def to(self, device: torch.device) -> Self:
        """Return the same numbers on `device`."""
        return type(self)(self.mean.to(device), self.std.to(device))

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Return images with mean 0 and standard deviation 1 over the training set, in float32."""
        return (images_NCHW - self.mean) / self.std


@dataclass(frozen=True)
class Data:
    """A training and a test set, ready for a model."""

    train: Split
    test: Split
    normalize: Normalizer
    classes: int

    def to(self, device: torch.device) -> Self:
        """Return the same data on `device`."""
        return type(self)(self.train.to(device), self.test.to(device), self.normalize.to(device), self.classes)

    def batches(self, part: Part, size: int, shuffle_seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized images with their labels, in an order that depends on the seed alone.

        Without a seed they come in the order of the file. The last batch is what is left, and may be smaller.
        """
        split = self.train if part == "train" else self.test
        order_N = torch.arange(len(split))
        if shuffle_seed is not None:
            order_N = torch.randperm(len(split), generator=torch.Generator().manual_seed(shuffle_seed))
        for index in torch.split(order_N.to(split.labels.device), size):
            yield self.normalize(split.images[index]), split.labels[index]
