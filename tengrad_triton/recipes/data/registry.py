"""The data sets by name. A new one is a name in `DatasetName` and an entry of `DATASETS`."""

from pathlib import Path
from typing import Literal, Protocol, get_args

from rich.console import Console

from tengrad_triton.recipes.data.class_names import CIFAR10, CIFAR100, FASHION_MNIST
from tengrad_triton.recipes.data.digits import Digits
from tengrad_triton.recipes.data.images import Data, Normalizer, Part, Split
from tengrad_triton.recipes.data.parquet import ParquetImages
from tengrad_triton.recipes.errors import UsageError

DatasetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100"]


class Source(Protocol):
    """Where a data set comes from."""

    @property
    def classes(self) -> int:
        """The number of classes; labels are 0 to classes - 1."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of an image."""

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first ``limit`` images of a part, from ``folder`` if it is given.

        Raises `UsageError` if the source cannot be read or holds something else.
        """


DATASETS: dict[DatasetName, Source] = {
    "digits": Digits(),
    "fashion-mnist": ParquetImages("zalando-datasets/fashion_mnist", "L", (28, 28), FASHION_MNIST),
    "cifar10": ParquetImages("uoft-cs/cifar10", "RGB", (32, 32), CIFAR10),
    "cifar100": ParquetImages("uoft-cs/cifar100", "RGB", (32, 32), CIFAR100, labels=("fine_label", "label")),
}


def data_folder(data: Path | None, name: DatasetName) -> Path | None:
    """Return the folder that holds a data set's train-*.parquet and test-*.parquet, or None for None.

    It is ``data`` itself or a folder in it with the data set's name, such as fashion-mnist or fashion_mnist. Raises
    `UsageError` if neither has such files, or if the data set does not come in files.
    """
    if data is None:
        return None
    if isinstance(DATASETS[name], Digits):
        raise UsageError(f"digits come with scikit-learn, got --data {data}: drop it or choose another --dataset")
    names = tuple(dict.fromkeys((name, name.replace("-", "_"))))
    for folder in (data, *(data / spelling for spelling in names)):
        if any(any(folder.glob(f"{part}-*.parquet")) for part in get_args(Part)):
            return folder
    raise UsageError(
        f"{data}: no test-*.parquet in it, nor in a folder {' or '.join(names)} of it: name the folder with "
        "train-*.parquet and test-*.parquet, or one that holds such a folder for each data set"
    )


def load(
    name: DatasetName, data: Path | None, train_limit: int | None, test_limit: int | None, console: Console
) -> Data:
    """Return a data set with its images decoded, on the CPU.

    A limit keeps the first images of a part; None keeps all. Raises `UsageError` as `data_folder` and `split` do.
    """
    source, folder = DATASETS[name], data_folder(data, name)
    test = source.split("test", folder, test_limit, console)  # first, because it is small: an error comes sooner
    train = source.split("train", folder, train_limit, console)
    return Data(train, test, Normalizer.of(train), source.classes)
