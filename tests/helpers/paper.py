"""`tengrad-triton paper` in tests: small reports on generated images."""

import json
from contextlib import contextmanager

import pytest

from helpers.image_files import write_folder
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.paper.measurements import complexity, inverses, phases
from tengrad_triton.recipes.paper.report import figures

SCALE = ["--scale.width", "4", "--scale.batch-size", "16", "--scale.depth", "10", "--device", "cpu", "--threads", "1"]
DATASETS = {"fashion_mnist": (), "cifar10": ("img", "label", "RGB"), "cifar100": ("img", "fine_label", "RGB")}


def write_data(folder):
    """Write 48 training and 24 test images of every data set."""
    for name, columns in DATASETS.items():
        (folder / name).mkdir()
        write_folder(folder / name, *columns, count=24)


@contextmanager
def figures_not_rendered():
    """Make an empty file of each figure that is missing: rendering takes most of a small report's time."""

    def save(figure, out, name):
        (out / "figures").mkdir(exist_ok=True)
        file = f"figures/paper-{name}.png"
        (out / file).touch()
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save)
        yield


@contextmanager
def measured_at_a_tiny_scale():
    """Measure table 1, the phases and the blocks of the inverse at sizes that the command line does not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverses, "ENTRIES", 24)
        patch.setattr(phases, "ROUNDS", 1)
        patch.setattr(complexity, "BASE", {"batch": 16, "width": 16, "depth": 2})
        patch.setattr(complexity, "VALUES", {"batch": (16, 32), "width": (8, 16), "depth": (1, 2)})
        yield


def arguments(data, out, *words, epochs=2):
    return ["paper", *words, *SCALE, "--scale.epochs", str(epochs), "--data", str(data), "--out", str(out)]


def run(data, out, *words, epochs=2):
    return main(arguments(data, out, *words, epochs=epochs))


def outcomes(out, kind="runs"):
    return {file.parent.name: json.loads(file.read_text()) for file in sorted((out / kind).rglob("outcome.json"))}
