"""The recipes' data: pixels as they were, batches by the seed, and files that are not what they should be."""

from typing import get_args

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.image_files import as_png, data_of, encoded, random_pixels, write_folder, write_parquet
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from tengrad_triton.recipes.data.class_names import CIFAR10, CIFAR100, FASHION_MNIST
from tengrad_triton.recipes.data.images import Normalizer, Split
from tengrad_triton.recipes.data.registry import DATASETS, DatasetName, data_folder, load
from tengrad_triton.recipes.errors import UsageError

SPELLINGS = [("fashion-mnist", "image", "label", "L"), ("cifar10", "img", "label", "RGB")]
SPELLINGS += [("cifar100", "img", "fine_label", "RGB")]


def loaded(name, folder=None, train_limit=None, test_limit=None):
    return load(name, folder, train_limit, test_limit, Console(quiet=True))


def tiny_data(count=10):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 3, 3).contiguous()
    return data_of(images, count)


def test_every_name_has_a_source():
    assert set(DATASETS) == set(get_args(DatasetName))


def test_digits_are_sklearns_in_their_order():
    data, truth = loaded("digits"), load_digits()
    images, labels = (torch.cat([getattr(s, key) for s in (data.train, data.test)]) for key in ("images", "labels"))
    assert (len(data.train), len(data.test)) == (1437, 360)
    np.testing.assert_array_equal(images[:, 0].numpy(), truth.images)
    np.testing.assert_array_equal(labels.numpy(), truth.target)


@pytest.mark.parametrize("metadata", [True, False], ids=["features", "plain"])
@pytest.mark.parametrize(("name", "image", "label", "mode"), SPELLINGS)
def test_parquet_pixels_and_labels_are_exact(tmp_path, name, image, label, mode, metadata):
    classes = DATASETS[name].classes
    pixels, labels = write_folder(tmp_path, image, label, mode, classes=classes if metadata else None)
    data = loaded(name, tmp_path)
    assert data.classes == classes
    for part, split in (("train", data.train), ("test", data.test)):
        expected = pixels[part][:, None] if mode == "L" else pixels[part].transpose(0, 3, 1, 2)
        assert split.images.dtype == torch.uint8
        np.testing.assert_array_equal(split.images.numpy(), expected)
        np.testing.assert_array_equal(split.labels.numpy(), labels[part])


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_images_are_converted_to_the_data_sets_mode(tmp_path, mode):
    colours = Image.fromarray(random_pixels(1, "RGB")[0]).convert(mode)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}-0.parquet", "img", "label", [as_png(colours)], [0])
    images = loaded("cifar10", tmp_path).train.images
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), np.array(colours.convert("RGB")))


def test_gray_images_may_be_stored_with_three_equal_channels(tmp_path):
    pixels = random_pixels(1, "L")[0]
    for part in ("train", "test"):
        image = as_png(Image.fromarray(pixels).convert("RGB"))
        write_parquet(tmp_path / f"{part}-0.parquet", "image", "label", [image], [0])
    np.testing.assert_array_equal(loaded("fashion-mnist", tmp_path).train.images[0, 0], pixels)


def with_names(folder, image, label, mode, names):
    """Write files of a mode whose schema names the classes."""
    for part in ("train", "test"):
        images = [encoded(pixels) for pixels in random_pixels(2, mode)]
        write_parquet(folder / f"{part}-0.parquet", image, label, images, [0, 1], names=names)


def many(folder, labels):
    """Write nameless files of CIFAR's images with so many samples that every class must be among them."""
    for part in ("train", "test"):
        write_parquet(
            folder / f"{part}-0.parquet", "img", "label", [encoded(random_pixels(1, "RGB")[0])] * len(labels), labels
        )


OTHERS = {  # what --dataset asks for, what writes the folder, and the message
    "Fashion-MNIST as CIFAR-10": (
        "cifar10",
        lambda folder: with_names(folder, "image", "label", "L", FASHION_MNIST),
        "10 classes (T-shirt/top, Trouser, Pullover, Dress, ...): expected 10 classes (airplane, ",
    ),
    "CIFAR-10 as Fashion-MNIST": (
        "fashion-mnist",
        lambda folder: with_names(folder, "img", "label", "RGB", CIFAR10),
        "10 classes (airplane, automobile, bird, cat, ...): expected 10 classes (T-shirt/top, ",
    ),
    "CIFAR-100 as CIFAR-10": (
        "cifar10",
        lambda folder: with_names(folder, "img", "fine_label", "RGB", CIFAR100),
        "columns img, fine_label: expected one called label; is this another --dataset?",
    ),
    "CIFAR-10 as CIFAR-100": (
        "cifar100",
        lambda folder: with_names(folder, "img", "label", "RGB", CIFAR10),
        "10 classes (airplane, automobile, bird, cat, ...): expected 100 classes (apple, ",
    ),
    "classes in another order": (
        "cifar10",
        lambda folder: with_names(folder, "img", "label", "RGB", CIFAR10[::-1]),
        "10 classes (truck, ",
    ),
    "fewer numbered classes": (
        "cifar10",
        lambda folder: with_names(folder, "img", "label", "RGB", tuple("012")),
        "3 classes (0, 1, 2, ...)",
    ),
    "gray images": (
        "cifar10",
        lambda folder: write_folder(folder, size=(32, 32)),
        "gray images (L): expected colour (RGB)",
    ),
    "colour images": (
        "fashion-mnist",
        lambda folder: write_folder(folder, mode="RGB", size=(28, 28)),
        "colour images (RGB): expected gray (L)",
    ),
    "another size": (
        "fashion-mnist",
        lambda folder: write_folder(folder, size=(28, 32)),
        "sample 0 of column image is an image of 28 x 32 pixels: expected 28 x 28",
    ),
    "ten classes of a hundred": ("cifar100", lambda folder: many(folder, [*range(10)] * 500), "10 classes in 5000"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_data_set_is_refused(tmp_path, case):
    name, write, message = OTHERS[case]
    write(tmp_path)
    with pytest.raises(UsageError) as error:
        loaded(name, tmp_path)
    assert message in str(error.value)
    assert str(error.value).endswith("is this another --dataset?")


@pytest.mark.parametrize("names", [FASHION_MNIST, ("T - shirt / top", *FASHION_MNIST[1:]), tuple("0123456789"), None])
def test_names_are_compared_by_their_letters_and_may_be_numbers_or_missing(tmp_path, names):
    with_names(tmp_path, "image", "label", "L", names)
    assert len(loaded("fashion-mnist", tmp_path).train) == 2


@pytest.mark.parametrize("place", [".", "fashion_mnist", "fashion-mnist"])
def test_a_folder_is_of_one_data_set_or_has_a_folder_for_each(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    write_folder(tmp_path / place)
    assert len(loaded("fashion-mnist", tmp_path).test) == 5
    assert data_folder(tmp_path, "fashion-mnist") == tmp_path / place
    if place != ".":
        with pytest.raises(UsageError, match=r"no test-\*.parquet in it, nor in a folder cifar10 of it"):
            data_folder(tmp_path, "cifar10")


def test_local_files_leave_nothing_behind(tmp_path, monkeypatch):
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    source.mkdir()
    scratch.mkdir()
    write_folder(source)
    before = {file: file.read_bytes() for file in source.iterdir()}
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded("fashion-mnist", source)
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "cache").exists()
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_limits_take_the_first_images(tmp_path, name):
    write_folder(tmp_path)
    folder = None if name == "digits" else tmp_path
    full, cut = loaded(name, folder), loaded(name, folder, train_limit=7, test_limit=3)
    assert torch.equal(cut.train.images, full.train.images[:7])
    assert torch.equal(cut.test.labels, full.test.labels[:3])
    assert len(loaded(name, folder, test_limit=10**6).test) == len(full.test)


def _overwrite(content):
    return lambda folder: (folder / "train-00001-of-00002.parquet").write_bytes(content)


def _rewrite(image="image", label="label", images=None, labels=(0, 1)):
    def write(folder):
        samples = [encoded(p) for p in random_pixels(2, "L")] if images is None else images
        for file in folder.glob("train-*"):
            file.unlink()
        write_parquet(folder / "train-0.parquet", image, label, samples, pa.array(labels))

    return write


def _truncate(folder):
    file = folder / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def _remove(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def _flip_bytes(folder):
    file = folder / "train-00000-of-00002.parquet"
    content = bytearray(file.read_bytes())
    content[20:400] = b"\x55" * 380
    file.write_bytes(content)


GRAY = encoded(random_pixels(1, "L")[0])
BROKEN = {
    "no files": (_remove("*"), "no test-*.parquet"),
    "no training files": (_remove("train-*"), "no train-*.parquet"),
    "truncated": (_truncate, "cannot be read"),
    "empty file": (_overwrite(b""), "cannot be read"),
    "not Parquet": (_overwrite(b"label,image\n"), "cannot be read"),
    "damaged inside": (_flip_bytes, "cannot be read"),
    "image column": (_rewrite(image="picture"), "columns picture, label: expected one called image or img"),
    "label column": (_rewrite(label="class"), "columns image, class: expected one called label"),
    "label too large": (_rewrite(labels=[0, 10]), "labels 0 to 10: expected 0 to 9"),
    "label negative": (_rewrite(labels=[-1, 0]), "labels -1 to 0: expected 0 to 9"),
    "label missing": (_rewrite(labels=[0, None]), "or gaps: expected an integer"),
    "label text": (_rewrite(labels=["cat", "dog"]), "expected an integer"),
    "image missing": (_rewrite(images=[GRAY, None]), "sample 1 of column image is no image"),
    "image first missing": (_rewrite(images=[None, GRAY]), "sample 0 of column image is no image"),
    "not an image": (_rewrite(images=[GRAY, {"bytes": b"x", "path": None}]), "cannot be read"),
    "sizes differ": (
        _rewrite(images=[GRAY, encoded(random_pixels(1, "L", size=(4, 5))[0])]),
        "sample 1 of column image is an image of 4 x 5 pixels: expected 28 x 28",
    ),
    "no samples": (_rewrite(images=[], labels=pa.array([], pa.int64())), "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_message(tmp_path, case, capfd):
    break_it, message = BROKEN[case]
    write_folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(UsageError) as error:
        loaded("fashion-mnist", tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(UsageError, match="another --dataset"):
        loaded("digits", tmp_path)


def test_an_unreachable_hub_is_one_message(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"uoft-cs/cifar10 \(test\).*Couldn't reach.*check the network.*--data"):
        loaded("cifar10")


def test_normalized_images_have_mean_0_and_deviation_1():
    images = torch.from_numpy(random_pixels(50, "RGB")).permute(0, 3, 1, 2)
    images[:, 1] = 7  # a constant channel
    normal = Normalizer.of(Split(images, torch.zeros(50)))(images).double()
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    deviation = normal.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 0, 1]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_batches_hold_every_image_once_with_its_label(size):
    data = tiny_data()
    batches = list(data.batches("train", size, shuffle_seed=5))
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == list(range(10))
    assert [len(y) for _, y in batches] == [size] * (10 // size) + [10 % size] * (10 % size > 0)
    images = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(images, data.normalize(data.train.images[labels]))


def test_the_order_depends_on_the_seed_alone():
    def order(seed):
        torch.manual_seed(123 if seed is None else seed + 1)
        return torch.cat([y for _, y in tiny_data(50).batches("train", 7, shuffle_seed=seed)]).tolist()

    assert order(None) == list(range(50))
    first = order(1)
    torch.rand(3)
    assert order(1) == first
    assert len({tuple(order(seed)) for seed in range(5)}) == 5
