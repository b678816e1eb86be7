"""What `tengrad-triton paper` is asked for: targets, rows, optimizers, seeds, and how much smaller than the paper's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt, ResolvedExistingDirectory

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.published import DAMPINGS, RATES, ROWS, SEEDS, WEIGHT_DECAYS, Row, chosen_rows
from tengrad_triton.recipes.training.settings import each_once

MANY = Parameter(consume_multiple=True, negative=(), show_default=lambda values: " ".join(map(str, values)) or "all")
MODELS_OF_FIGURES = ("wrn-28-4", "mobilenetv2", "densenet-19-100")


def _of(dataset: str, *models: str) -> tuple[Row, ...]:
    return tuple(row for model in models for row in ROWS if (row.model, row.dataset) == (model, dataset))


ACCURACIES = (*_of("fashion-mnist", "3c1f"), *_of("cifar10", "wrn-28-4"), *_of("cifar100", "wrn-28-4"))
# What each shows, in the paper's words, and the rows whose runs it needs.
OF_RUNS: Mapping[str, tuple[str, tuple[Row, ...]]] = {
    "table2": ("Top test accuracy and time", ROWS),
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


def known_target(_: type, name: str) -> None:
    """Reject what is not a table or figure that can be run; raises `ValueError`."""
    if name in DRAWINGS:
        raise ValueError(f"{name} is {DRAWINGS[name]}: there is nothing to run")
    if name not in TARGETS:
        raise ValueError(f"{name!r} is not known: choose from {', '.join(TARGETS)}")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much smaller than the paper's experiments; what is not given is the paper's."""

    epochs: PositiveInt | None = None
    "Passes over the training set; the decays of the learning rate move in proportion."
    train_images: PositiveInt | None = None
    "Train on the first so many images."
    test_images: PositiveInt | None = None
    "Test on the first so many images."
    width: PositiveInt | None = None
    "Channels of the first convolution; for densenet, what a layer adds."
    depth: PositiveInt | None = None
    "Depth of the wide residual networks and the densenets."
    batch_size: PositiveInt | None = None
    "Images a step."

    def said(self) -> str:
        """Return what is smaller than in the paper, as the figures say it."""
        given = {key.replace("_", " "): value for key, value in asdict(self).items() if value is not None}
        return ", ".join(f"{key} {value}" for key, value in given.items()) or "the paper's"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that figures 9 and 10 and tables 3 to 5 try."""

    lr: Annotated[tuple[PositiveFloat, ...], MANY] = RATES
    "Learning rates."
    weight_decay: Annotated[tuple[PositiveFloat, ...], MANY] = WEIGHT_DECAYS
    "Weight decays; figures 9 and 10 keep the tuned one."
    damping: Annotated[tuple[PositiveFloat, ...], MANY] = DAMPINGS
    "Dampings."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to run, at which scale, with what, and into which folder."""

    row: Annotated[tuple[str, ...], MANY] = ()
    "Rows of table 2, by their title or its beginning, such as 3C1F; all that the target shows if not given."
    optimizer: Annotated[tuple[OptimizerName, ...], MANY, Parameter(validator=each_once)] = (
        "tengrad",
        "sgd",
        "kfac",
        "ekfac",
        "kbfgs",
        "tengrad_defaults",
        "adamw",
        "muon",
    )
    "Optimizers; kbfgsl, and soap and shampoo where their package is installed, can be named too."
    seeds: PositiveInt = SEEDS
    "Runs of each, with seeds from 0."
    scale: Annotated[Scale, Parameter(name="scale", group="Scale")] = field(default_factory=Scale)
    grid: Annotated[Grid, Parameter(name="grid", group="Grid")] = field(default_factory=Grid)
    data: ResolvedExistingDirectory | None = None
    "Folder with a folder of Parquet files for each data set (fashion-mnist, cifar10, cifar100), instead of the hub."
    out: Path = Path("runs/paper")
    "Folder of the runs and the report; what is there already is kept and gone on with."
    estimate: Annotated[bool, Parameter(negative=())] = False
    "Only say how long it would take."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to train; auto takes the GPU if there is one."
    threads: PositiveInt | None = None
    "CPU threads; as many as torch takes by itself if not given."

    def rows(self, targets: tuple[str, ...]) -> tuple[Row, ...]:
        """Return the rows whose runs the targets need, but for those that --row leaves out; raises `UsageError`."""
        needed = [row for row in ROWS if any(row in OF_RUNS[target][1] for target in targets if target in OF_RUNS)]
        if not self.row:
            return tuple(needed)
        chosen = chosen_rows(self.row)
        strangers = [row.title for row in chosen if row not in needed]
        if needed and len(strangers) == len(chosen):
            shown = "; ".join(row.title for row in needed)
            raise UsageError(f"--row {' '.join(self.row)}: {', '.join(targets)} shows {shown}")
        return tuple(row for row in chosen if row in needed)

    def plain(self) -> dict[str, Any]:
        """Return what was asked, as JSON has it, without what is of this machine only."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("data", "out", "estimate")}
        return kept | {"data": None if self.data is None else "DIR"}


def expanded(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the targets with all of them for `all`."""
    return TARGETS[:-1] if "all" in targets else targets
