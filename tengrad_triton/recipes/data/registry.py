"""The data sets of the recipes. A new one is a name in `DatasetName` and a row in `DATASETS`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from rich.console import Console

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.data.parquet import ParquetImages
from tengrad_triton.recipes.data.images import Data, Normalizer, Part, Split

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100"]


class Source(Protocol):
    """Where a data set comes from."""

    @property
    def classes(self) -> int:
        """How many labels there are: 0 to classes - 1."""

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first `limit` images, from `folder` if one is named; raises `UsageError`."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which ship with it; the last 360 are for testing.

    They are kept in their order, because neighbours are by the same writer: a shuffled split would be easier than the
    digits of someone new.
    """

    classes: int = 10
    train_size: int = 1437

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first `limit` digits of a part."""
        if folder is not None:
            raise UsageError(f"digits come with scikit-learn, got --data {folder}: drop it or choose another --dataset")
        # Imported here because scikit-learn takes a second to import, and only these need it.
        from sklearn.datasets import load_digits  # noqa: PLC0415

        pixels, labels = load_digits(return_X_y=True)
        rows = slice(self.train_size) if part == "train" else slice(self.train_size, None)
        images_NCHW = torch.from_numpy(pixels[rows]).to(torch.uint8).view(-1, 1, 8, 8)
        return Split(images_NCHW[:limit], torch.from_numpy(labels[rows])[:limit])


DATASETS: dict[DatasetName, Source] = {
    "digits": Digits(),
    "fashion-mnist": ParquetImages("zalando-datasets/fashion_mnist", mode="L", classes=10),
    "cifar10": ParquetImages("uoft-cs/cifar10", mode="RGB", classes=10),
    "cifar100": ParquetImages("uoft-cs/cifar100", mode="RGB", classes=100),
}


def load(
    name: DatasetName, folder: Path | None, train_limit: int | None, test_limit: int | None, console: Console
) -> Data:
    """Return a data set, decoded, on the CPU; raises `UsageError`."""
    source = DATASETS[name]
    test = source.split(
        "test", folder, test_limit, console
    )  # first, because it is small and fails as well as the other
    train = source.split("train", folder, train_limit, console)
    return Data(train, test, Normalizer.of(train), source.classes)
