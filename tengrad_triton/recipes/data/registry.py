"""The data sets by name. A new one is a name in `DatasetName` and an entry of `DATASETS`."""

from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console

from tengrad_triton.recipes.data.digits import Digits
from tengrad_triton.recipes.data.images import Data, Normalizer, Part, Split
from tengrad_triton.recipes.data.parquet import ParquetImages

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100"]


class Source(Protocol):
    """Where a data set comes from."""

    @property
    def classes(self) -> int:
        """The number of classes; labels are 0 to classes - 1."""

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first ``limit`` images of a part, from ``folder`` if it is given.

        Raises `UsageError` if the source cannot be read or holds something else.
        """


DATASETS: dict[DatasetName, Source] = {
    "digits": Digits(),
    "fashion-mnist": ParquetImages("zalando-datasets/fashion_mnist", mode="L", classes=10),
    "cifar10": ParquetImages("uoft-cs/cifar10", mode="RGB", classes=10),
    "cifar100": ParquetImages("uoft-cs/cifar100", mode="RGB", classes=100),
}


def load(
    name: DatasetName, folder: Path | None, train_limit: int | None, test_limit: int | None, console: Console
) -> Data:
    """Return a data set with its images decoded, on the CPU; raises `UsageError` as `Source.split` does.

    A limit keeps the first images of a part; None keeps all.
    """
    source = DATASETS[name]
    test = source.split("test", folder, test_limit, console)  # first, because it is small: an error comes sooner
    train = source.split("train", folder, train_limit, console)
    return Data(train, test, Normalizer.of(train), source.classes)
