"""The runs that a target needs: each is a `train` run of one optimizer from one seed, in a folder of its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tengrad_triton.recipes.data.registry import DatasetName
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings
from tengrad_triton.recipes.paper.published import BATCH_SIZE, PAPER, ROWS, Row, with_tuned
from tengrad_triton.recipes.paper.request import SENSITIVITY, Asked
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class Run:
    """One optimizer, one seed.

    Attributes:
        label: the folder's name, which tells the run from its neighbours.
        grid: whether it is part of a search, and not of table 2.
    """

    row: Row
    name: OptimizerName
    settings: Settings
    label: str
    grid: bool

    def folder(self, out: Path) -> Path:
        """Return the run's folder."""
        return out / ("grid" if self.grid else "runs") / self.row.key / self.label

    def outcome(self, out: Path) -> dict[str, Any] | None:
        """Return what a finished run wrote, or None; raises `UsageError` if it ran with other settings."""
        folder = self.folder(out)
        if not (folder / "settings.json").exists():
            return None
        stored, own = (self._decisive(plain) for plain in (_read(folder / "settings.json"), self.settings.plain()))
        if stored != own:
            other = ", ".join(sorted(key for key in stored.keys() | own.keys() if stored.get(key) != own.get(key)))
            raise UsageError(f"{folder}: was run with another {other}: name another --out, or ask for the same")
        finished = folder / "outcome.json"
        return _read(finished) if finished.exists() else None

    def _decisive(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Return what the numbers depend on: not the place, and not the other optimizers' settings."""
        theirs = {key for key, value in plain.items() if isinstance(value, dict) and key != self.name}
        return {key: value for key, value in plain.items() if key not in theirs | {"data", "device", "threads"}}


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}: delete its folder to run it again") from error
    return content


def settings_of(row: Row, name: OptimizerName, seed: int, asked: Asked, own: OptimizerSettings) -> Settings:
    """Return a run's settings: the paper's, but for the scale."""
    scale = asked.scale
    epochs = scale.epochs or row.epochs
    decays = tuple(sorted({max(1, round(epoch * epochs / row.epochs)) for epoch in row.decay_at}))
    return Settings(
        optimizer=(name,),
        model=_model_of(row, scale.depth),
        width=scale.width or row.width,
        dataset=row.dataset,
        data=data_folder(asked.data, row.dataset),
        train_limit=scale.train_images,
        test_limit=scale.test_images,
        epochs=epochs,
        batch_size=scale.batch_size or BATCH_SIZE,
        decay_at=tuple(epoch for epoch in decays if epoch < epochs),
        decay=row.decay,
        seed=seed,
        device=asked.device,
        threads=asked.threads,
        **{name: own},  # type: ignore[arg-type]
    )


def _model_of(row: Row, depth: int | None) -> str:
    """Return the row's model, or the one of its family with another depth."""
    family, *sizes = row.model.split("-")
    return row.model if depth is None or len(sizes) != 2 else f"{family}-{depth}-{sizes[1]}"


def data_folder(data: Path | None, dataset: DatasetName) -> Path | None:
    """Return where --data has a data set; raises `UsageError` if it has not."""
    if data is None:
        return None
    for name in (dataset, dataset.replace("-", "_")):
        if (data / name).is_dir():
            return data / name
    raise UsageError(f"--data {data}: no folder {dataset} in it: expected one a data set, each with Parquet files")


def runs_of(asked: Asked, targets: tuple[str, ...]) -> list[Run]:
    """Return the runs that the targets need, seed by seed: an interrupted series has something of every optimizer."""
    runs = [
        Run(row, name, settings_of(row, name, seed, asked, row.of(name)), f"{name}-seed{seed}", grid=False)
        for row in asked.rows(targets)
        for seed in range(asked.seeds)
        for name in asked.optimizer
    ]
    return runs + list(_searched(asked, targets))


def _searched(asked: Asked, targets: tuple[str, ...]) -> Iterator[Run]:
    """Yield the runs of figures 9 and 10, which vary TENGraD on Fashion-MNIST, and of tables 3 to 5, which vary all."""
    seen = set()
    if any(target in SENSITIVITY for target in targets):
        own = ROWS[0].tuned["tengrad"][1]
        for run in _grid(ROWS[0], "tengrad", asked, (own,)):
            seen.add((run.row.key, run.label))
            yield run
    if "tables3-5" in targets:
        for row in asked.rows(("table2",)):
            for name in (name for name in asked.optimizer if name in PAPER):
                points = _grid(row, name, asked, asked.grid.weight_decay)
                yield from (run for run in points if (row.key, run.label) not in seen)


def _grid(row: Row, name: OptimizerName, asked: Asked, weight_decays: tuple[float, ...]) -> Iterator[Run]:
    dampings: tuple[float | None, ...] = (None,) if name == "sgd" else asked.grid.damping
    for seed, lr, weight_decay, damping in product(range(asked.seeds), asked.grid.lr, weight_decays, dampings):
        tuned = (lr, weight_decay) if damping is None else (lr, weight_decay, damping)
        own = with_tuned(row.of(name), tuned)
        settings = settings_of(row, name, seed, asked, own)
        yield Run(row, name, settings, "-".join([name, *map(str, tuned), f"seed{seed}"]), grid=True)
