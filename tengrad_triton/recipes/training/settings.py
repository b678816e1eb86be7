"""The settings of a run, which are the flags of the command line and the content of settings.json."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt, ResolvedExistingDirectory
from cyclopts.validators import Number

from tengrad_triton.recipes.data.registry import DatasetName
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS, Choice
from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings

T = TypeVar("T")


def each_once(_: type, names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless there is at least one optimizer, and each is named once."""
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"got {' '.join(names) or 'nothing'}, expected at least one optimizer, and each of them once")


def _known_model(_: type, name: str) -> None:
    try:
        image_model(name)
    except UsageError as error:
        raise ValueError(str(error)) from error


ModelName = Annotated[str, Parameter(validator=_known_model)]


def _with_optimizers(settings: type[T]) -> type[T]:
    """Add a field for each optimizer to a class that becomes a dataclass: its own settings, by its name.

    Raises `TypeError` if another setting has that name.
    """
    for name, own in OPTIMIZERS.items():
        if name in settings.__annotations__:
            raise TypeError(f"optimizer {name!r}: another setting has this name: rename its entry of OPTIMIZERS")
        settings.__annotations__[name] = own
        setattr(settings, name, field(default_factory=own))
    return settings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
@_with_optimizers
class Settings:
    """Everything that the numbers of a run depend on, except the machine and the versions.

    The settings of each optimizer are a field with its name, such as ``sgd``.
    """

    optimizer: Annotated[
        tuple[Choice, ...],
        Parameter(consume_multiple=True, negative=(), validator=each_once, show_default=" ".join),
    ] = ("tengrad", "tengrad_paper", "sgd", "adamw")
    "Optimizers to train with, one after the other. All start from the same weights and see the same batches."
    model: ModelName = "3c1f"
    "3c1f or mlp (of width 32), mobilenetv2, resnet18, resnet50, vit-tiny, wrn-DEPTH-WIDEN, densenet-DEPTH-GROWTH."
    width: PositiveInt | None = None
    "Channels of the first convolution, units of a hidden layer or features of a token; the model's own if not given."
    dataset: DatasetName = "digits"
    "Data set. The digits ship with scikit-learn; the others come from the Hugging Face hub or from --data."
    data: ResolvedExistingDirectory | None = None
    "Folder with train-*.parquet and test-*.parquet, or with such a folder for each data set; the hub if not given."
    train_limit: PositiveInt | None = None
    "Number of training images, from the first; all if not given."
    test_limit: PositiveInt | None = None
    "Number of test images, from the first; all if not given."
    epochs: PositiveInt = 15
    "Passes over the training set."
    batch_size: PositiveInt = 128
    "Images per step."
    decay_at: Annotated[tuple[PositiveInt, ...], Parameter(consume_multiple=True, negative=(), show_default=False)] = ()
    "Epochs after which every optimizer's learning rate is multiplied by --decay."
    decay: PositiveFloat = 0.1
    "Factor of the learning rates after the epochs of --decay-at."
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**32))] = 0
    "Seed of the weights, of the order of the data and of the labels that TENGraD samples."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Device to train on; auto takes the GPU if there is one."
    threads: PositiveInt | None = None
    "CPU threads; torch's default if not given."

    @property
    def channels(self) -> int:
        """The width of the model: the given one, or the model's default."""
        return image_model(self.model).width if self.width is None else self.width

    def of(self, name: OptimizerName) -> OptimizerSettings:
        """Return the settings of one optimizer."""
        settings: OptimizerSettings = getattr(self, name)
        return settings

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, without those that were not given."""
        given = dataclasses.asdict(self, dict_factory=lambda items: {k: v for k, v in items if v not in (None, ())})
        values: dict[str, Any] = json.loads(json.dumps(given, default=str))
        return values

    def flags(self) -> dict[str, Any]:
        """Return the settings as flags of the command line: {"--sgd.lr": 0.1, ...}."""
        return _flags(self.as_json())

    def title(self, images: int) -> str:
        """Return a title: the model, its width, the number of training images and the data set."""
        return f"{self.model}, width {self.channels}, on {images} images of {self.dataset}"


def installed() -> tuple[OptimizerName, ...]:
    """Return the optimizers whose packages are installed."""
    return tuple(name for name, settings in OPTIMIZERS.items() if is_installed(settings.package))


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _flags(settings: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return nested settings as flags: {"sgd": {"lr": 1}} becomes {"--sgd.lr": 1}."""
    flags: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key.replace('_', '-')}"
        flags |= _flags(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flags
