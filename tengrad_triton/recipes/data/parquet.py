"""Image data sets in the layout of the Hugging Face hub: on the hub, or as Parquet files in a folder.

Key: N images, C channels, H height, W width.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tengrad_triton.recipes.data.class_names import plain
from tengrad_triton.recipes.data.images import Part, Split
from tengrad_triton.recipes.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

IMAGE_COLUMNS = ("image", "img")
CHUNK = 500  # images decoded between two updates of the progress bar
SAMPLES_OF_CLASS = 50  # a file with this many samples for each class has samples of each
ANOTHER = "is this another --dataset?"
GRAY = ("1", "L", "LA", "I", "I;16", "F")  # Pillow's modes with one channel of brightness


@dataclass(frozen=True)
class ParquetImages:
    """A data set of encoded images.

    Attributes:
        hub: its name on the Hugging Face hub.
        mode: Pillow's mode that the images are decoded to.
        size: the height and the width of every image, in pixels.
        names: the classes by name, that of label 0 first.
        labels: the columns that may hold the labels, the usual one first.
    """

    hub: str
    mode: Literal["L", "RGB"]
    size: tuple[int, int]
    names: tuple[str, ...]
    labels: tuple[str, ...] = ("label",)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of an image."""
        return (len(self.mode), *self.size)

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first ``limit`` images of a part, from the hub if no folder is given.

        Raises `UsageError` if the files cannot be read, or are those of another data set by their classes, columns,
        image size or channels.
        """
        origin = f"{folder or self.hub} ({part})"
        with _open(part, folder, self.hub) as table:
            image, label = (_column(table, names, origin) for names in (IMAGE_COLUMNS, self.labels))
            if folder is not None:
                _check_names(table, label, self.names, origin)
            samples = table.select(range(len(table) if limit is None else min(limit, len(table))))
            labels_N = _labels(table, label, self.classes, origin)[: len(samples)]
            _check_first(samples, image, self.mode, origin)
            return Split(_decode(samples, image, self.mode, self.size, origin, console), labels_N)


@contextmanager
def _open(part: Part, folder: Path | None, hub: str) -> Iterator["Dataset"]:
    """Open one part. Local files leave no cache behind; the hub's own client keeps its files in its cache."""
    # Imported here because it takes a second to import, and the digits do not need it.
    import datasets  # noqa: PLC0415

    advice = "check the network, or name a folder with --data" if folder is None else "fetch the files again"
    with _report_errors(f"{folder or hub} ({part})", advice), ExitStack() as stack:
        if folder is None:
            yield datasets.load_dataset(hub, split=part)
            return
        files = [str(file) for file in sorted(folder.glob(f"{part}-*.parquet"))]
        if not files:
            raise UsageError(
                f"{folder}: no {part}-*.parquet in it: name the folder that holds train-* and test-*.parquet"
            )
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        # load_dataset("parquet", ...) is the same reader, but reports every use to the hub: without a network it waits.
        yield datasets.Dataset.from_parquet(files, cache_dir=cache)


@contextmanager
def _report_errors(origin: str, advice: str) -> Iterator[None]:
    """Turn errors of files and of the network into a `UsageError`, and silence the log lines of their libraries."""
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]  # noqa: PLC0415
    from pyarrow import ArrowException  # noqa: PLC0415

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except (ArrowException, DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise UsageError(
            f"{origin}: cannot be read ({reason}): expected Parquet files with encoded images; {advice}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _column(table: "Dataset", names: tuple[str, ...], origin: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UsageError(
        f"{origin}: columns {', '.join(table.column_names)}: expected one called {' or '.join(names)}; {ANOTHER}"
    )


def _check_names(table: "Dataset", column: str, expected: tuple[str, ...], origin: str) -> None:
    """Raise `UsageError` if the files name other classes. Names that are mere numbers say only how many there are."""
    names: list[str] = list(getattr(table.features[column], "names", None) or ())
    numbered = all(name.isdecimal() for name in names) and len(names) == len(expected)
    if names and not numbered and list(map(plain, names)) != list(map(plain, expected)):
        got, known = (f"{len(words)} classes ({', '.join(words[:4])}, ...)" for words in (names, list(expected)))
        raise UsageError(f"{origin}: {got}: expected {known}; {ANOTHER}")


def _labels(table: "Dataset", column: str, classes: int, origin: str) -> Tensor:
    labels_N = np.asarray(table.select_columns(column).with_format("numpy")[:][column])
    if labels_N.dtype.kind not in "iu":  # missing labels turn integers into floats
        raise UsageError(
            f"{origin}: column {column} holds {labels_N.dtype}, or gaps: expected an integer for every sample"
        )
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= classes:
        raise UsageError(f"{origin}: labels {low} to {high}: expected 0 to {classes - 1}; {ANOTHER}")
    seen = len(np.unique(labels_N))
    if len(labels_N) >= SAMPLES_OF_CLASS * classes and seen < classes:
        raise UsageError(f"{origin}: {seen} classes in {len(labels_N)} samples: expected {classes}; {ANOTHER}")
    return torch.from_numpy(labels_N.astype(np.int64))


def _check_first(samples: "Dataset", column: str, mode: str, origin: str) -> None:
    """Raise `UsageError` if the first image is gray and colour is expected, or the reverse.

    Some copies store gray images with three equal channels: those are gray too, where gray is expected.
    """
    from datasets import Image  # noqa: PLC0415

    image = samples.select_columns(column).cast_column(column, Image())[0][column]
    if image is None:
        return
    red, *others = np.array(image.convert("RGB")).transpose(2, 0, 1)
    is_gray = image.mode in GRAY or (mode == "L" and all((red == other).all() for other in others))
    if is_gray != (mode == "L"):
        got, expected = ("gray", "colour") if is_gray else ("colour", "gray")
        raise UsageError(f"{origin}: {got} images ({image.mode}): expected {expected} ({mode}); {ANOTHER}")


def _decode(samples: "Dataset", column: str, mode: str, size: tuple[int, int], origin: str, console: Console) -> Tensor:
    """Return the images [N, C, H, W]; raises `UsageError` if one is missing or has another size."""
    from datasets import Image  # noqa: PLC0415

    images = samples.select_columns(column).cast_column(column, Image(mode=mode))
    decoded: list[Tensor] = []
    starts = range(0, len(images), CHUNK)
    for start in track(starts, f"decoding {origin}", console=console, transient=True, disable=not console.is_terminal):
        for index, image in enumerate(images[start : start + CHUNK][column], start):
            pixels = np.array(image)
            if image is None or pixels.shape[:2] != size:
                got = "no image" if image is None else "an image of {} x {} pixels".format(*pixels.shape[:2])
                expected = "{} x {}".format(*size)
                raise UsageError(
                    f"{origin}: sample {index} of column {column} is {got}: expected {expected}; {ANOTHER}"
                )
            decoded.append(torch.from_numpy(pixels))
    images_NHWC = torch.stack(decoded).view(len(decoded), *decoded[0].shape[:2], -1)
    return images_NHWC.permute(0, 3, 1, 2).contiguous()
