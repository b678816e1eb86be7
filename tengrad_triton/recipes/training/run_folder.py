"""The folder of a run. Every file in it is replaced whole, so that a kill loses at most the current epoch."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from tengrad_triton.files import replacing
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import History, Record
from tengrad_triton.recipes.training.metrics_files import epochs_csv, epochs_json, parse_epochs, parse_steps, steps_csv
from tengrad_triton.recipes.training.settings import Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")


@dataclass(frozen=True)
class RunFolder:
    """The settings, metrics and checkpoints of a run."""

    path: Path

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Self:
        """Make a new folder with settings.json; raises `UsageError` if it is not empty or cannot be made."""
        check_free(path)
        try:
            (path / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be made ({error.strerror}): name another folder") from error
        run = cls(path)
        run.write_json("settings.json", settings.as_json())
        return run

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file; raises `ValueError` for a number that is not finite."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file; raises `UsageError` if it is missing or damaged."""
        return self._read(name, json.loads)

    def read_text(self, name: str) -> str:
        """Return the content of a text file; raises `UsageError` if it is missing or damaged."""
        return self._read(name, str)

    def _read(self, name: str, parse: Callable[[str], T]) -> T:
        file = self.path / name
        try:
            return parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: {error}: expected the folder of a run that was started before") from error

    def add_session(self, machine: dict[str, Any]) -> None:
        """Append the machine of this start to machine.json: a resumed run may be on another machine."""
        before = self.read_json("machine.json") if (self.path / "machine.json").exists() else []
        self.write_json("machine.json", [*before, machine])

    def write_metrics(self, history: History) -> None:
        """Replace steps.csv, metrics.csv and metrics.json."""
        self.write_text("steps.csv", steps_csv(history))
        self.write_text("metrics.csv", epochs_csv(history))
        self.write_json("metrics.json", epochs_json(history))

    def read_metrics(self, steps_per_epoch: int) -> History:
        """Return what `write_metrics` wrote; raises `UsageError` if it is missing or damaged."""
        epochs, steps = self._read("metrics.json", parse_epochs), self._read("steps.csv", parse_steps)
        for name in epochs.keys() | steps.keys():
            got, expected = len(steps.get(name, ())), steps_per_epoch * len(epochs.get(name, ()))
            if got != expected:
                raise UsageError(
                    f"{self.path / 'steps.csv'}: {got} steps of {name}, metrics.json has the epochs of {expected}: "
                    f"write both again with tengrad-triton train --resume {self.path}"
                )
        return {name: Record(epochs[name], steps[name]) for name in epochs}

    def events(self, name: OptimizerName, record: Record) -> "SummaryWriter":
        """Return a new TensorBoard writer of one optimizer, which has the epochs of the record."""
        # Imported here because TensorBoard takes a second to import, and a mistaken command should end before that.
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
        """Return the last checkpoint of one optimizer, on the CPU; None before its first epoch has ended.

        Raises `UsageError` if the file is damaged or holds something else.
        """
        file = self._checkpoint(name)
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch documents none for damaged files: zip, pickle and value errors occur
            raise UsageError(f"{file}: damaged ({error}): delete it to train {name} from the start") from error
        if not isinstance(state, dict) or not state.keys() >= {"rows", "steps"}:
            raise UsageError(f"{file}: expected the keys rows and steps: delete it to train {name} from the start")
        return state

    def _checkpoint(self, name: OptimizerName) -> Path:
        return self.path / "checkpoints" / f"{name}.pt"


def add_events(writer: "SummaryWriter", record: Record, since: int) -> None:
    """Write and flush the metrics after epoch ``since``. A process that is killed loses what it has not flushed."""
    for epoch in record.epochs[since:]:
        for name, value in asdict(epoch).items():
            if isinstance(value, float):
                writer.add_scalar(name.replace("_", "/", 1), value, epoch.epoch)
    first = since * len(record.steps) // max(1, len(record.epochs))
    for name, column_S in vars(record.steps).items():
        for step, value in enumerate(column_S[first:].tolist(), first):
            writer.add_scalar(f"step/{name}", value, step)
    writer.flush()


def check_free(path: Path) -> None:
    """Raise `UsageError` if ``path`` exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"--out {path}: already there: name a new folder, or resume the run with --resume {path}")
