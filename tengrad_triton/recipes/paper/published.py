"""What the paper (Soori et al. 2021) ran, tuned and reported: tables 2 to 5 and the appendix, on one V100."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tengrad_triton.recipes.data.registry import DatasetName
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.first_order import AdamwSettings
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings

Tuned = tuple[float, float, float] | tuple[float, float]  # the values of `TUNED`; SGD has no damping
PAPER: tuple[OptimizerName, ...] = ("sgd", "tengrad_paper", "kfac", "ekfac", "kbfgs")
BATCH_SIZE, REFRESH_EVERY, MOMENTUM, SEEDS = 128, 100, 0.9, 5
RATES = WEIGHT_DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3)
TUNED = ("lr", "weight_decay", "damping")

# The powers of the batch m and the width d in the cost of the curvature and of a step (table 1), and the highest of d.
TABLE1: Mapping[OptimizerName, tuple[str, str]] = {
    "tengrad_paper": ("m²d + m³", "md² + md + m²"),
    "kfac": ("md² + d³", "d³"),
    "ekfac": ("md² + d³", "md²"),
    "kbfgs": ("md² + d²", "d³"),
}

# The paper did not tune AdamW. It has torch's defaults; its own in the command line suit the digits.
ADAMW = AdamwSettings(lr=1e-3, weight_decay=0.01)


@dataclass(frozen=True)
class Experiment:
    """A line of table 2: a model on a data set.

    Attributes:
        reported: for each optimizer, the seconds to the top test accuracy, and that accuracy in percent (table 2).
        tuned: for each optimizer, the settings that the paper tuned (tables 3 to 5).
        decay_at: epochs after which the learning rate is multiplied by ``decay``.
    """

    title: str
    model: str
    dataset: DatasetName
    width: int
    epochs: int
    reported: Mapping[OptimizerName, tuple[int, float]]
    tuned: Mapping[OptimizerName, Tuned]
    decay_at: tuple[int, ...] = ()
    decay: float = 1.0

    @property
    def key(self) -> str:
        """The name in paths of files."""
        return f"{self.model}-{self.dataset}"

    def scale_of(self, settings: Mapping[str, Any]) -> str:
        """Return how the scale of a run differs from the paper's, as a phrase."""
        paper = {"model": self.model, "width": self.width, "epochs": self.epochs, "batch_size": BATCH_SIZE}
        paper |= {"train_limit": None, "test_limit": None}
        words = {"train_limit": "train images", "test_limit": "test images", "batch_size": "batch"}
        other = {key: settings.get(key) for key, value in paper.items() if settings.get(key) != value}
        return ", ".join(f"{words.get(key, key)} {value}" for key, value in other.items()) or "the paper's"

    def of(self, name: OptimizerName) -> OptimizerSettings:
        """Return the settings of an optimizer: the paper's, those of K-BFGS for K-BFGS(L), or its own defaults."""
        settings = ADAMW if name == "adamw" else OPTIMIZERS[name]()
        known: OptimizerName = "kbfgs" if name == "kbfgsl" else name
        if known not in self.tuned:
            return settings
        return with_tuned(settings, self.tuned[known])


def with_tuned(settings: OptimizerSettings, tuned: Tuned) -> OptimizerSettings:
    """Return an optimizer's settings with other values of those that the paper tunes."""
    return settings.changed(momentum=MOMENTUM, refresh_every=REFRESH_EVERY, **dict(zip(TUNED, tuned, strict=False)))


def _experiment(
    title: str, model: str, dataset: Literal["cifar10", "cifar100"], width: int, *numbers: object
) -> Experiment:
    reported, tuned = (dict(zip(PAPER, entries, strict=True)) for entries in numbers)  # type: ignore[call-overload]
    decay: tuple[tuple[int, ...], float] = ((30, 45), 0.1) if dataset == "cifar100" else ((10, 20, 30, 40, 50), 0.5)
    return Experiment(title, model, dataset, width, 60, reported, tuned, *decay)


EXPERIMENTS = (
    Experiment(
        "3C1F, Fashion-MNIST", "3c1f", "fashion-mnist", 128, 10,
        {
            "sgd": (52, 92.60), "tengrad_paper": (43, 93.15), "kfac": (188, 92.2), "ekfac": (275, 92.01),
            "kbfgs": (113, 92.12),
        },
        {
            "sgd": (0.03, 0.001), "tengrad_paper": (0.003, 0.001, 0.1), "kfac": (0.003, 0.001, 0.1),
            "ekfac": (0.001, 0.003, 0.03), "kbfgs": (0.03, 0.01, 0.01),
        },
    ),
    _experiment(
        "WideResNet, CIFAR-10", "wrn-28-4", "cifar10", 16,
        [(1128, 94.01), (1108, 94.10), (2454, 94.50), (2936, 94.10), (1132, 92.70)],
        [(0.01, 0.003), (0.03, 0.003, 0.1), (0.03, 0.003, 0.03), (0.01, 0.003, 0.03), (0.03, 0.003, 0.03)],
    ),
    _experiment(
        "WideResNet, CIFAR-100", "wrn-28-4", "cifar100", 16,
        [(1004, 75.79), (1124, 75.20), (2419, 75.60), (2766, 76.07), (1151, 74.35)],
        [(0.01, 0.003), (0.01, 0.03, 0.3), (0.003, 0.01, 0.03), (0.003, 0.01, 0.03), (0.003, 0.01, 0.01)],
    ),
    _experiment(
        "DenseNet, CIFAR-10", "densenet-19-100", "cifar10", 100,
        [(2278, 93.52), (2077, 93.40), (4292, 93.31), (4820, 93.11), (2412, 93.41)],
        [(0.03, 0.003), (0.1, 0.003, 0.2), (0.01, 0.003, 0.03), (0.01, 0.003, 0.01), (0.01, 0.003, 0.01)],
    ),
    _experiment(
        "DenseNet, CIFAR-100", "densenet-19-100", "cifar100", 100,
        [(1909, 72.10), (2002, 73.90), (3542, 74.50), (3788, 74.29), (2292, 73.50)],
        [(0.01, 0.003), (0.1, 0.003, 0.1), (0.01, 0.003, 0.03), (0.01, 0.003, 0.03), (0.01, 0.003, 0.03)],
    ),
    _experiment(
        "MobileNetV2, CIFAR-10", "mobilenetv2", "cifar10", 32,
        [(1350, 92.70), (1841, 92.71), (3221, 92.63), (4304, 92.83), (1728, 91.30)],
        [(0.01, 0.003), (0.01, 0.01, 0.2), (0.01, 0.003, 0.1), (0.01, 0.003, 0.1), (0.01, 0.03, 0.03)],
    ),
    _experiment(
        "MobileNetV2, CIFAR-100", "mobilenetv2", "cifar100", 32,
        [(1370, 72.78), (1406, 72.81), (3152, 72.82), (4687, 72.97), (1695, 72.01)],
        [(0.01, 0.003), (0.01, 0.01, 0.3), (0.01, 0.003, 0.03), (0.01, 0.003, 0.03), (0.03, 0.01, 0.03)],
    ),
)  # fmt: skip


def rates(dataset: DatasetName, model: str) -> dict[OptimizerName, dict[str, float]]:
    """Return the `TUNED` settings of each optimizer that a run has on a data set, if nobody gives others.

    They are those of the experiment with the data set and the model, or with another member of the model's family, or
    else of the first experiment with the data set. On the digits, which the paper does not have, there are none.
    """
    family = model.partition("-")[0]
    on_it = [experiment for experiment in EXPERIMENTS if experiment.dataset == dataset]
    if not on_it:
        return {}
    chosen = next((e for e in on_it if e.model.partition("-")[0] == family), on_it[0])
    own = {name: asdict(chosen.of(name)) for name in OPTIMIZERS}
    return {name: {key: of[key] for key in TUNED if key in of} for name, of in own.items()}


def described_rates() -> list[str]:
    """Return a line for each data set: the `rates` of its first experiment that differ from an optimizer's defaults."""
    lines = []
    for dataset, model in {e.dataset: e.model for e in reversed(EXPERIMENTS)}.items():
        other = [
            f"{name} {', '.join(map(str, values.values()))}"
            for name, values in rates(dataset, model).items()
            if values.items() - asdict(OPTIMIZERS[name]()).items()
        ]
        lines.append(f"{dataset}: {'; '.join(other)}")
    return lines[::-1]


def choose_experiments(words: tuple[str, ...]) -> tuple[Experiment, ...]:
    """Return the experiments whose title or key is one of the words, or else begins with it.

    Raises `UsageError` if a word fits none.
    """
    chosen: list[Experiment] = []
    for word in words:
        named = [(experiment, (experiment.title.lower(), experiment.key.lower())) for experiment in EXPERIMENTS]
        found = [experiment for experiment, names in named if word.lower() in names]
        found = found or [e for e, names in named if any(name.startswith(word.lower()) for name in names)]
        if not found or not word:
            known = "; ".join(experiment.title for experiment in EXPERIMENTS)
            raise UsageError(f"--row {word}: no such row: choose from {known}")
        chosen += [experiment for experiment in found if experiment not in chosen]
    return tuple(chosen)
