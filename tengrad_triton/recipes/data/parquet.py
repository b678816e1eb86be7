"""Image data sets in the Hugging Face layout: on the hub, or as Parquet files in a folder.

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

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.data.images import Part, Split

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
CHUNK = 500  # images decoded between two movements of the progress bar


@dataclass(frozen=True)
class ParquetImages:
    """A data set of encoded images; `mode` is what Pillow decodes them to."""

    hub: str
    mode: Literal["L", "RGB"]
    classes: int

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first `limit` images, from the hub if no folder is named."""
        origin = f"{folder or self.hub} ({part})"
        with _opened(part, folder, self.hub) as table:
            image, label = (_column(table, names, origin) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
            rows = table.select(range(len(table) if limit is None else min(limit, len(table))))
            labels_N = _labels(rows, label, self.classes, origin)
            return Split(_decoded(rows, image, self.mode, origin, console), labels_N)


@contextmanager
def _opened(part: Part, folder: Path | None, hub: str) -> Iterator["Dataset"]:
    """Open one part: local files leave no cache behind, the hub's stay where its own client keeps them."""
    # Imported here because it takes a second, and the digits don't need it.
    import datasets  # noqa: PLC0415

    advice = "check the network, or name a folder with --data" if folder is None else "fetch the files again"
    with _reported(f"{folder or hub} ({part})", advice), ExitStack() as stack:
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
        # Not load_dataset("parquet", ...), which is the same reader but tells the hub of every use: without a network,
        # a wait for its name server.
        yield datasets.Dataset.from_parquet(files, cache_dir=cache)


@contextmanager
def _reported(origin: str, advice: str) -> Iterator[None]:
    """Turn what can go wrong with files and the network into a `UsageError`, instead of log lines and a traceback."""
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


def _labels(rows: "Dataset", column: str, classes: int, origin: str) -> Tensor:
    labels_N = np.asarray(rows.select_columns(column).with_format("numpy")[:][column])
    if labels_N.dtype.kind not in "iu":  # missing labels turn integers into floats
        raise UsageError(f"{origin}: column {column} holds {labels_N.dtype}, or gaps: expected an integer a row")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= classes:
        raise UsageError(f"{origin}: labels {low} to {high}: expected 0 to {classes - 1}; is this another --dataset?")
    return torch.from_numpy(labels_N.astype(np.int64))


def _decoded(rows: "Dataset", column: str, mode: str, origin: str, console: Console) -> Tensor:
    from datasets import Image  # noqa: PLC0415

    images = rows.select_columns(column).cast_column(column, Image(mode=mode))
    shape_HW: tuple[int, ...] | None = None
    decoded: list[Tensor] = []
    starts = range(0, len(images), CHUNK)
    for start in track(starts, f"decoding {origin}", console=console, transient=True, disable=not console.is_terminal):
        for row, image in enumerate(images[start : start + CHUNK][column], start):
            pixels = np.array(image)
            shape_HW = shape_HW or pixels.shape
            if image is None or pixels.shape != shape_HW:
                got = "no image" if image is None else f"{pixels.shape}"
                raise UsageError(f"{origin}: row {row} of column {column} holds {got}: expected an image of {shape_HW}")
            decoded.append(torch.from_numpy(pixels))
    images_NHWC = torch.stack(decoded).view(len(decoded), *decoded[0].shape[:2], -1)
    return images_NHWC.permute(0, 3, 1, 2).contiguous()
