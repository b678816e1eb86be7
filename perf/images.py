"""Fashion-MNIST from Parquet files, read with pyarrow and Pillow: a GPU machine may have nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from tengrad_triton.recipes.data.images import Data, Normalizer, Part, Split


def load(folder: Path, limit: int | None) -> Data:
    """Return the training and test images of a folder with train-*.parquet and test-*.parquet, decoded.

    Raises:
        FileNotFoundError: the folder has no such files.
    """
    train, test = (_split(folder, part, limit) for part in ("train", "test"))
    return Data(train, test, Normalizer.of(train), classes=10)


def _split(folder: Path, part: Part, limit: int | None) -> Split:
    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}: no {part}-*.parquet in it: name the folder with Fashion-MNIST's files")
    columns = [pq.read_table(file, columns=["image", "label"]) for file in files]
    encoded = [row["bytes"] for table in columns for row in table["image"].to_pylist()][:limit]
    labels = [label for table in columns for label in table["label"].to_pylist()][:limit]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("L")) for image in encoded])
    return Split(torch.from_numpy(pixels)[:, None], torch.tensor(labels))
