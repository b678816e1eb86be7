"""The runs that a target needs: each is a `train` run of one optimizer from one seed, in a folder of its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tengrad_triton.files import read_bytes, reason
from tengrad_triton.recipes.data.registry import data_folder
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings
from tengrad_triton.recipes.paper.published import BATCH_SIZE, EXPERIMENTS, PAPER, Experiment, with_tuned
from tengrad_triton.recipes.paper.request import SENSITIVITY, Request
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class PaperRun:
    """One optimizer from one seed.

    Attributes:
        label: the name of the run's folder, unique within the experiment.
        grid: whether the run belongs to a search for hyperparameters, and not to table 2.
    """

    experiment: Experiment
    name: OptimizerName
    settings: Settings
    label: str
    grid: bool

    def folder(self, out: Path) -> Path:
        """Return the folder of the run."""
        return out / ("grid" if self.grid else "runs") / self.experiment.key / self.label

    def outcome(self, out: Path) -> dict[str, Any] | None:
        """Return the content of outcome.json, or None for a run that is not finished.

        Raises `UsageError` if the folder holds a run with other settings.
        """
        folder = self.folder(out)
        if not (folder / "settings.json").exists():
            return None
        stored = self._compared(RunFolder(folder).settings())
        own = self._compared(self.settings.as_json())
        if stored != own:
            other = ", ".join(sorted(key for key in stored.keys() | own.keys() if stored.get(key) != own.get(key)))
            raise UsageError(f"{folder}: was run with another {other}: name another --out, or ask for the same")
        return read_outcome(folder) if (folder / "outcome.json").exists() else None

    def epochs_left(self, out: Path) -> int:
        """Return the number of epochs that a started run still lacks; all before it has ended its first."""
        file = self.folder(out) / "metrics.json"
        return self.settings.epochs - (len(read_json(file)) if file.exists() else 0)

    def _compared(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings without the place, the device and those of the other optimizers."""
        others = {key for key, value in settings.items() if isinstance(value, dict) and key != self.name}
        return {key: value for key, value in settings.items() if key not in others | {"data", "device", "threads"}}


def read_json(file: Path) -> Any:
    """Return the content of a JSON file in the folder of a run; raises `UsageError` if it is missing or damaged."""
    try:
        return json.loads(read_bytes(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: {reason(error)}: delete its folder to run it again") from error


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return the content of outcome.json; raises `UsageError` if it is missing or damaged."""
    outcome = read_json(folder / "outcome.json")
    if not isinstance(outcome, dict) or not outcome.keys() >= {"rows", "diverged", "median_step_seconds"}:
        raise UsageError(f"{folder / 'outcome.json'}: expected the outcome of a run: delete its folder to run it again")
    return outcome


def settings_of(
    experiment: Experiment, name: OptimizerName, seed: int, request: Request, own: OptimizerSettings
) -> Settings:
    """Return the settings of a run: the paper's, at the scale of the request; ``own`` are those of the optimizer."""
    scale = request.scale
    epochs = scale.epochs or experiment.epochs
    decays = tuple(sorted({max(1, round(epoch * epochs / experiment.epochs)) for epoch in experiment.decay_at}))
    return Settings(
        optimizer=(name,),
        model=_model_of(experiment, scale.depth),
        width=scale.width or experiment.width,
        dataset=experiment.dataset,
        data=data_folder(request.data, experiment.dataset),
        train_limit=scale.train_images,
        test_limit=scale.test_images,
        epochs=epochs,
        batch_size=scale.batch_size or BATCH_SIZE,
        decay_at=tuple(epoch for epoch in decays if epoch < epochs),
        decay=experiment.decay,
        seed=seed,
        device=request.device,
        threads=request.threads,
        **{name: own},
    )


def _model_of(experiment: Experiment, depth: int | None) -> str:
    """Return the name of the experiment's model, with another depth if one is given and the model has one."""
    family, *sizes = experiment.model.split("-")
    return experiment.model if depth is None or len(sizes) != 2 else f"{family}-{depth}-{sizes[1]}"


def runs_of(request: Request, targets: tuple[str, ...]) -> list[PaperRun]:
    """Return the runs that the targets need, seed by seed, so that an interrupted series has runs of every optimizer.

    Raises `UsageError` as `Request.experiments` and `data_folder` do.
    """
    runs = [
        PaperRun(e, name, settings_of(e, name, seed, request, e.of(name)), f"{name}-seed{seed}", grid=False)
        for e in request.experiments(targets)
        for seed in range(request.seeds)
        for name in request.optimizer
    ]
    return runs + list(_searches(request, targets))


def _searches(request: Request, targets: tuple[str, ...]) -> Iterator[PaperRun]:
    """Yield the runs of figures 9 and 10 (TENGraD on Fashion-MNIST) and of tables 3 to 5 (all optimizers)."""
    seen = set()
    if any(target in SENSITIVITY for target in targets):
        weight_decay = EXPERIMENTS[0].tuned["tengrad_paper"][1]
        for run in _grid(EXPERIMENTS[0], "tengrad_paper", request, (weight_decay,)):
            seen.add((run.experiment.key, run.label))
            yield run
    if "tables3-5" in targets:
        for experiment in request.experiments(("table2",)):
            for name in (name for name in request.optimizer if name in PAPER):
                points = _grid(experiment, name, request, request.grid.weight_decay)
                yield from (run for run in points if (experiment.key, run.label) not in seen)


def _grid(
    experiment: Experiment, name: OptimizerName, request: Request, weight_decays: tuple[float, ...]
) -> Iterator[PaperRun]:
    own = experiment.of(name)
    dampings: tuple[float | None, ...] = (None,) if name == "sgd" else request.grid.damping
    for seed, lr, weight_decay, damping in product(range(request.seeds), request.grid.lr, weight_decays, dampings):
        tuned = (lr, weight_decay) if damping is None else (lr, weight_decay, damping)
        settings = settings_of(experiment, name, seed, request, with_tuned(own, tuned))
        yield PaperRun(experiment, name, settings, "-".join([name, *map(str, tuned), f"seed{seed}"]), grid=True)
