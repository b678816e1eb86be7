"""The folder of a run: every file in it is replaced whole, so that a kill loses at most the current epoch."""

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers import OptimizerName
from tengrad_triton.recipes.settings import Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Row:
    """One epoch of one optimizer. Losses are means over images; the training ones are taken while the weights move."""

    optimizer: OptimizerName
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    eval_seconds: float


History = dict[OptimizerName, list[Row]]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` only if the block succeeds."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """Settings, metrics and checkpoints of a run."""

    path: Path

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Self:
        """Make a new folder; raises `UsageError` as `check_free` does."""
        check_free(path)
        try:
            (path / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be made ({error.strerror}): name another folder") from error
        run = cls(path)
        run.write_json("settings.json", settings.plain())
        return run

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON file; a number that is not finite raises `ValueError`, because JSON has none."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """Read one JSON file; raises `UsageError` if it is not there or damaged."""
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: {error}: expected the folder of a run that was started before") from error

    def add_session(self, machine: dict[str, Any]) -> None:
        """Append to machine.json: a run that is resumed may go on elsewhere."""
        before = self.read_json("machine.json") if (self.path / "machine.json").exists() else []
        self.write_json("machine.json", [*before, machine])

    def write_metrics(self, history: History) -> None:
        """Write metrics.csv and metrics.json anew, a row an optimizer and epoch."""
        rows = [asdict(row) for rows in history.values() for row in rows]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write_text("metrics.csv", text.getvalue())
        self.write_json("metrics.json", [{key: _or_null(value) for key, value in row.items()} for row in rows])

    def events(self, name: OptimizerName, rows: list[Row]) -> "SummaryWriter":
        """Start the TensorBoard events of one optimizer anew, with the epochs that it has behind it."""
        # Imported here because TensorBoard takes a second, which a wrong flag should not have to wait for.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        folder = self.path / "tensorboard" / name
        shutil.rmtree(folder, ignore_errors=True)
        writer = SummaryWriter(folder)
        for row in rows:
            add_events(writer, row)
        return writer

    def save_checkpoint(self, name: OptimizerName, state: dict[str, Any]) -> None:
        """Replace the checkpoint of one optimizer."""
        with replacing(self._checkpoint(name)) as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self, name: OptimizerName) -> dict[str, Any] | None:
        """Return the last checkpoint of one optimizer on the CPU, or None before its first epoch has ended."""
        file = self._checkpoint(name)
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # torch documents no exceptions for damaged files: zip, pickle and value errors occur
            raise UsageError(f"{file}: damaged ({error}): delete it to train {name} from its start") from error
        return state

    def _checkpoint(self, name: OptimizerName) -> Path:
        return self.path / "checkpoints" / f"{name}.pt"


def add_events(writer: "SummaryWriter", row: Row) -> None:
    """Write one epoch at once: what is not flushed is lost with the process."""
    for name, value in asdict(row).items():
        if isinstance(value, float):
            writer.add_scalar(name.replace("_", "/", 1), value, row.epoch)
    writer.flush()


def _or_null(value: Any) -> Any:
    """JSON has no number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_free(path: Path) -> None:
    """Raise `UsageError` unless `path` can become the folder of a new run."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"--out {path}: already there: name a new folder, or go on with it by --resume {path}")
