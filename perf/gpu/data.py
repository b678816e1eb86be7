"""Fashion-MNIST as one file: decoding its Parquet files takes seven seconds, and packages that a GPU need not have."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import torch

from tengrad_triton.recipes.data.images import Data, Normalizer, Split
from tengrad_triton.recipes.errors import UsageError

PACK = "python -m perf.gpu data FOLDER OUT.npz"
PARTS = ("train", "test")


def pack(folder: Path, path: Path) -> Data:
    """Decode the Parquet files of a folder, write images and labels into an NPZ file, and return them.

    Raises:
        UsageError: the folder has no such files, they hold something else, the file cannot be written, or a package
            that decodes images is missing.
    """
    try:  # imported here because only whoever packs the images needs these
        import numpy as np  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415

        from tengrad_triton.recipes.data.registry import load  # noqa: PLC0415

        data = load("fashion-mnist", folder, None, None, Console(stderr=True))
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed: run pip install '.[train]' where images are packed"
        ) from error
    arrays = {}
    for part in PARTS:
        split = getattr(data, part)
        arrays |= {f"{part}_images": split.images.numpy(), f"{part}_labels": split.labels.numpy().astype(np.uint8)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:  # given a name without a suffix, NumPy would add one
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}): name another file") from error
    return data


def unpack(path: Path) -> Data:
    """Return the images of a file that `pack` has written.

    Raises:
        UsageError: the file is missing, or is another.
    """
    import numpy as np  # noqa: PLC0415 - everything but the race goes without it

    try:
        with np.load(path) as arrays:
            splits = [
                Split(torch.from_numpy(arrays[f"{part}_images"]), torch.from_numpy(arrays[f"{part}_labels"]).long())
                for part in PARTS
            ]
    except (OSError, KeyError, ValueError, AttributeError, TypeError, BadZipFile) as error:
        raise UsageError(f"{path}: no packed images ({type(error).__name__}): make the file with `{PACK}`") from error
    return Data(*splits, Normalizer.of(splits[0]), classes=10)


def random_images(train: int, test: int) -> Data:
    """Return random images of Fashion-MNIST's shape, to rehearse."""
    generator = torch.Generator().manual_seed(0)
    splits = [
        Split(
            torch.randint(256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8),
            torch.randint(10, (count,), generator=generator),
        )
        for count in (train, test)
    ]
    return Data(*splits, Normalizer.of(splits[0]), classes=10)
