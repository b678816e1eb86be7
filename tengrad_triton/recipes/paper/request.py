"""The arguments of `tengrad-triton paper`: targets, experiments, optimizers, seeds, and the scale."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt, ResolvedExistingDirectory

from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS, Choice
from tengrad_triton.recipes.paper.published import (
    DAMPINGS,
    EXPERIMENTS,
    RATES,
    SEEDS,
    WEIGHT_DECAYS,
    Experiment,
    choose_experiments,
)
from tengrad_triton.recipes.training.settings import each_once

MANY = Parameter(consume_multiple=True, negative=(), show_default=lambda values: " ".join(map(str, values)) or "all")
MODELS_OF_FIGURES = ("wrn-28-4", "mobilenetv2", "densenet-19-100")


def _of(dataset: str, *models: str) -> tuple[Experiment, ...]:
    return tuple(e for model in models for e in EXPERIMENTS if (e.model, e.dataset) == (model, dataset))


ACCURACIES = (*_of("fashion-mnist", "3c1f"), *_of("cifar10", "wrn-28-4"), *_of("cifar100", "wrn-28-4"))
# The tables and figures made from runs: the caption in the paper, and the experiments that each needs.
OF_RUNS: Mapping[str, tuple[str, tuple[Experiment, ...]]] = {
    "table2": ("Top test accuracy and time", EXPERIMENTS),
    "figure1": ("Training loss, CIFAR-100 on DenseNet", _of("cifar100", "densenet-19-100")),
    "figure4": ("Train accuracy", ACCURACIES),
    "figure5": ("Test accuracy", ACCURACIES),
    "figure11": ("Train and test accuracy with error bars, Fashion-MNIST", _of("fashion-mnist", "3c1f")),
    "figure12": ("Train accuracy with error bars, CIFAR-10", _of("cifar10", *MODELS_OF_FIGURES)),
    "figure13": ("Test accuracy with error bars, CIFAR-10", _of("cifar10", *MODELS_OF_FIGURES)),
    "figure14": ("Train accuracy with error bars, CIFAR-100", _of("cifar100", *MODELS_OF_FIGURES)),
    "figure15": ("Test accuracy with error bars, CIFAR-100", _of("cifar100", *MODELS_OF_FIGURES)),
}
SENSITIVITY = {"figure9": "Train accuracy by hyperparameters", "figure10": "Test accuracy by hyperparameters"}
INVERSES = {"figure6": "second convolution", "figure7": "third convolution", "figure8": "fully connected layer"}
MEASURED = {
    "table1": "Cost by batch, width and depth",
    "phases": "Time of a step by phase",
    "memory": "Peak memory",
}
DRAWINGS = {"figure2": "a drawing of the methods", "figure3": "a drawing of a convolution as a matrix product"}
TARGETS = (*OF_RUNS, *SENSITIVITY, *INVERSES, *MEASURED, "tables3-5", "all")
KNOWN = ", ".join(sorted(TARGETS, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(2), name)))


def check_target(_: type, name: str) -> None:
    """Raise `ValueError` unless the name is a target: a table or figure that runs or measurements make."""
    if name in DRAWINGS:
        raise ValueError(f"{name} is {DRAWINGS[name]}: there is nothing to run")
    if name not in TARGETS:
        like = ["tables3-5"] if name.lower() in ("table3", "table4", "table5") else []
        like += [target for target in TARGETS if target == name.lower()]
        meant = f" (did you mean {like[0]!r}?)" if like else did_you_mean(name, TARGETS)
        raise ValueError(f"{name!r} is not known{meant}: choose from {KNOWN}")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The scale of the runs; values that are not given are the paper's."""

    epochs: PositiveInt | None = None
    "Passes over the training set; the decays of the learning rate come in proportion."
    train_images: PositiveInt | None = None
    "Number of training images, from the first."
    test_images: PositiveInt | None = None
    "Number of test images, from the first."
    width: PositiveInt | None = None
    "Channels of the first convolution; for densenet, channels that each layer adds."
    depth: PositiveInt | None = None
    "Depth of the wide residual networks and the densenets."
    batch_size: PositiveInt | None = None
    "Images per step."

    def description(self) -> str:
        """Return the given values as a phrase, such as "width 4, epochs 2"."""
        given = {key.replace("_", " "): value for key, value in asdict(self).items() if value is not None}
        return ", ".join(f"{key} {value}" for key, value in given.items()) or "the paper's"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The hyperparameters of figures 9 and 10 and of tables 3 to 5."""

    lr: Annotated[tuple[PositiveFloat, ...], MANY] = RATES
    "Learning rates."
    weight_decay: Annotated[tuple[PositiveFloat, ...], MANY] = WEIGHT_DECAYS
    "Weight decays; figures 9 and 10 have the tuned one only."
    damping: Annotated[tuple[PositiveFloat, ...], MANY] = DAMPINGS
    "Dampings."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, at which scale, with which optimizers, and into which folder."""

    row: Annotated[tuple[str, ...], MANY] = ()
    "Rows of table 2: a title or its beginning, such as 3C1F; all rows of the target if not given."
    optimizer: Annotated[tuple[Choice, ...], MANY, Parameter(validator=each_once)] = tuple(
        name for name, settings in OPTIMIZERS.items() if settings.in_paper
    )
    "Optimizers; the others of train can be named too, if their packages are installed."
    seeds: PositiveInt = SEEDS
    "Number of runs of each optimizer, with seeds from 0."
    scale: Annotated[Scale, Parameter(name="scale", group="Scale")] = field(default_factory=Scale)
    grid: Annotated[Grid, Parameter(name="grid", group="Grid")] = field(default_factory=Grid)
    data: ResolvedExistingDirectory | None = None
    "Folder with train-*.parquet and test-*.parquet, or with such a folder for each data set; the hub if not given."
    out: Path = Path("runs/paper")
    (
        "Folder of the runs and the report; finished runs and measurements in it are kept. An interrupted run resumes; "
        "an interrupted measurement (table1, figure6 to figure8, phases, memory) starts anew."
    )
    estimate: Annotated[bool, Parameter(negative=())] = False
    "Only estimate how long the work takes, from parts of it; at the paper's scale on a CPU each can take minutes."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Device to train on; auto takes the GPU if there is one."
    threads: PositiveInt | None = None
    "CPU threads; torch's default if not given."

    def experiments(self, targets: tuple[str, ...]) -> tuple[Experiment, ...]:
        """Return the experiments that the targets need, restricted to those of --row.

        Raises `UsageError` if --row names only experiments that the targets do not need.
        """
        lists = [OF_RUNS[target][1] for target in targets if target in OF_RUNS]
        needed = [experiment for experiment in EXPERIMENTS if any(experiment in of for of in lists)]
        if not self.row:
            return tuple(needed)
        chosen = choose_experiments(self.row)
        common = tuple(experiment for experiment in chosen if experiment in needed)
        if needed and not common:
            shown = "; ".join(experiment.title for experiment in needed)
            raise UsageError(f"--row {' '.join(self.row)}: {', '.join(targets)} shows {shown}")
        return common


def expand_all(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the targets; every target if `all` is among them."""
    return TARGETS[:-1] if "all" in targets else targets
