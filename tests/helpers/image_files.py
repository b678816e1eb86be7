"""Data sets of random images: as Parquet files of the hub's layout, and in memory."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tengrad_triton.recipes.data.images import Data, Normalizer, Split


def random_pixels(count, mode, seed=0, size=(6, 5)):
    shape = (count, *size) if mode == "L" else (count, *size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(file, image, label, images, labels, classes=None):
    """Write samples as the hub has them: with its features in the schema's metadata if `classes` is given."""
    columns = {image: pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), label: pa.array(labels)}
    table = pa.table(columns)
    if classes is not None:
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(num_classes=classes)})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, file)


def write_folder(folder, image="image", label="label", mode="L", count=5, classes=None, size=(6, 5)):
    """Write two training shards and one test shard, and return their pixels and labels."""
    pixels = {"train": random_pixels(2 * count, mode, 0, size), "test": random_pixels(count, mode, 1, size)}
    labels = {part: np.arange(len(images)) % 10 for part, images in pixels.items()}
    for part, shards in {"train": 2, "test": 1}.items():
        for shard in range(shards):
            samples = slice(shard * count, (shard + 1) * count)
            images = [encoded(p) for p in pixels[part][samples]]
            file = folder / f"{part}-{shard:05}-of-{shards:05}.parquet"
            write_parquet(file, image, label, images, labels[part][samples], classes)
    return pixels, labels


def data_of(images, classes):
    """Return a data set whose training and test images are the same, with labels that count up."""
    split = Split(images, torch.arange(len(images)) % classes)
    return Data(split, split, Normalizer.of(split), classes)
