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

from tengrad_triton.recipes.data.images import Part, Split
from tengrad_triton.recipes.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
CHUNK = 500  # images decoded between two updates of the progress bar


@dataclass(frozen=True)
class ParquetImages:
    """A data set of encoded images.

    Attributes:
        hub: its name on the Hugging Face hub.
        mode: Pillow's mode that the images are decoded to.
        classes: how many labels there are.
    """

    hub: str
    mode: Literal["L", "RGB"]
    classes: int

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first ``limit`` images of a part, from the hub if no folder is given; raises `UsageError`."""
        origin = f"{folder or self.hub} ({part})"
        with _open(part, folder, self.hub) as table:
            image, label = (_column(table, names, origin) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
            samples = table.select(range(len(table) if limit is None else min(limit, len(table))))
            labels_N = _labels(samples, label, self.classes, origin)
            return Split(_decode(samples, image, self.mode, origin, console), labels_N)


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
    raise UsageError(f"{origin}: columns {', '.join(table.column_names)}: expected one called {' or '.join(names)}")


def _labels(samples: "Dataset", column: str, classes: int, origin: str) -> Tensor:
    labels_N = np.asarray(samples.select_columns(column).with_format("numpy")[:][column])
    if labels_N.dtype.kind not in "iu":  # missing labels turn integers into floats
        raise UsageError(
            f"{origin}: column {column} holds {labels_N.dtype}, or gaps: expected an integer for every sample"
        )
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= classes:
        raise UsageError(f"{origin}: labels {low} to {high}: expected 0 to {classes - 1}; is this another --dataset?")
    return torch.from_numpy(labels_N.astype(np.int64))


def _decode(samples: "Dataset", column: str, mode: str, origin: str, console: Console) -> Tensor:
    """Return the images [N, C, H, W]; raises `UsageError` if one is missing or has another size than the first."""
    from datasets import Image  # noqa: PLC0415

    images = samples.select_columns(column).cast_column(column, Image(mode=mode))
    shape_HW: tuple[int, ...] | None = None
    decoded: list[Tensor] = []
    starts = range(0, len(images), CHUNK)
    for start in track(starts, f"decoding {origin}", console=console, transient=True, disable=not console.is_terminal):
        for index, image in enumerate(images[start : start + CHUNK][column], start):
            pixels = np.array(image)
            shape_HW = shape_HW or pixels.shape
            if image is None or pixels.shape != shape_HW:
                got = "no image" if image is None else f"{pixels.shape}"
                raise UsageError(
                    f"{origin}: sample {index} of column {column} holds {got}: expected an image of {shape_HW}"
                )
            decoded.append(torch.from_numpy(pixels))
    images_NHWC = torch.stack(decoded).view(len(decoded), *decoded[0].shape[:2], -1)
    return images_NHWC.permute(0, 3, 1, 2).contiguous()
