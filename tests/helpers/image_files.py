"""Data sets of random images: as Parquet files of the hub's layout, and in memory."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tengrad_triton.recipes.data.images import Data, Normalizer, Split

SIZES = {"L": (28, 28), "RGB": (32, 32)}  # those of the data sets, by Pillow's mode


def random_pixels(count, mode, seed=0, size=None):
    size = size or SIZES[mode]
    shape = (count, *size) if mode == "L" else (count, *size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels):
    return as_png(Image.fromarray(pixels))


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(file, image, label, images, labels, names=None):
    """Write samples as the hub has them: with its features in the schema's metadata if `names` of classes are given."""
    columns = {image: pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), label: pa.array(labels)}
    table = pa.table(columns)
    if names is not None:
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, file)


def write_folder(folder, image="image", label="label", mode="L", count=5, classes=None, size=None):
    """Write two training shards and one test shard, and return their pixels and labels."""
    pixels = {"train": random_pixels(2 * count, mode, 0, size), "test": random_pixels(count, mode, 1, size)}
    names = None if classes is None else [str(number) for number in range(classes)]
    labels = {part: np.arange(len(images)) % 10 for part, images in pixels.items()}
    for part, shards in {"train": 2, "test": 1}.items():
        for shard in range(shards):
            samples = slice(shard * count, (shard + 1) * count)
            images = [encoded(p) for p in pixels[part][samples]]
            file = folder / f"{part}-{shard:05}-of-{shards:05}.parquet"
            write_parquet(file, image, label, images, labels[part][samples], names)
    return pixels, labels


def data_of(images, classes):
    """Return a data set whose training and test images are the same, with labels that count up."""
    split = Split(images, torch.arange(len(images)) % classes)
    return Data(split, split, Normalizer.of(split), classes)
