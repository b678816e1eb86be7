"""The folder of a run: every file in it is replaced whole, so that a kill loses at most the current epoch."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import (
    History,
    Record,
    parsed_rows,
    parsed_steps,
    rows_csv,
    rows_json,
    steps_csv,
)
from tengrad_triton.recipes.training.settings import Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")


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
        return self._read(name, json.loads)

    def read_text(self, name: str) -> str:
        """Read one text file; raises `UsageError` if it is not there or damaged."""
        return self._read(name, str)

    def _read(self, name: str, parse: Callable[[str], T]) -> T:
        file = self.path / name
        try:
            return parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: {error}: expected the folder of a run that was started before") from error

    def add_session(self, machine: dict[str, Any]) -> None:
        """Append to machine.json: a run that is resumed may go on elsewhere."""
        before = self.read_json("machine.json") if (self.path / "machine.json").exists() else []
        self.write_json("machine.json", [*before, machine])

    def write_metrics(self, history: History) -> None:
        """Write steps.csv, metrics.csv and metrics.json anew."""
        self.write_text("steps.csv", steps_csv(history))
        self.write_text("metrics.csv", rows_csv(history))
        self.write_json("metrics.json", rows_json(history))

    def read_metrics(self, steps_an_epoch: int) -> History:
        """Read what `write_metrics` wrote; raises `UsageError` if it is missing or damaged."""
        rows, steps = self._read("metrics.json", parsed_rows), self._read("steps.csv", parsed_steps)
        for name in rows.keys() | steps.keys():
            got, expected = len(steps.get(name, ())), steps_an_epoch * len(rows.get(name, ()))
            if got != expected:
                raise UsageError(
                    f"{self.path / 'steps.csv'}: {got} steps of {name}, metrics.json has the epochs of {expected}: "
                    f"write both anew with tengrad-triton train --resume {self.path}"
                )
        return {name: Record(rows[name], steps[name]) for name in rows}

    def events(self, name: OptimizerName, record: Record) -> "SummaryWriter":
        """Start the TensorBoard events of one optimizer anew, with the epochs that it has behind it."""
        # Imported here because TensorBoard takes a second, which a wrong flag should not have to wait for.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        folder = self.path / "tensorboard" / name
        shutil.rmtree(folder, ignore_errors=True)
        writer = SummaryWriter(folder)
        add_events(writer, record, since=0)
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
        if not isinstance(state, dict) or not state.keys() >= {"rows", "steps"}:
            raise UsageError(f"{file}: no rows and steps in it: delete it to train {name} from its start")
        return state

    def _checkpoint(self, name: OptimizerName) -> Path:
        return self.path / "checkpoints" / f"{name}.pt"


def add_events(writer: "SummaryWriter", record: Record, since: int) -> None:
    """Write what came after epoch `since` at once: what is not flushed is lost with the process."""
    for row in record.rows[since:]:
        for name, value in asdict(row).items():
            if isinstance(value, float):
                writer.add_scalar(name.replace("_", "/", 1), value, row.epoch)
    first = since * len(record.steps) // max(1, len(record.rows))
    for name, column_S in vars(record.steps).items():
        for step, value in enumerate(column_S[first:].tolist(), first):
            writer.add_scalar(f"step/{name}", value, step)
    writer.flush()


def check_free(path: Path) -> None:
    """Raise `UsageError` unless `path` can become the folder of a new run."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"--out {path}: already there: name a new folder, or go on with it by --resume {path}")
