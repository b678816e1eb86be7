"""The folder of a run. Every file in it is replaced whole, so that a kill loses at most the current epoch."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from tengrad_triton import files
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import History, Record
from tengrad_triton.recipes.training.metrics_files import epochs_csv, epochs_json, parse_epochs, parse_steps, steps_csv
from tengrad_triton.recipes.training.settings import Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")
SUFFIX = ".tengrad-triton"  # of our TensorBoard events: a resumed run deletes no others
OF_EVERY_RUN = ("optimizer", "model", "dataset", "epochs", "batch_size", "seed")  # in the settings of each
WRITTEN = ("machine.json", "steps.csv", "metrics.csv", "metrics.json")


@dataclass(frozen=True)
class RunFolder:
    """The settings, metrics and checkpoints of a run."""

    path: Path

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Self:
        """Make a new folder with settings.json; raises `UsageError` if it is not empty or cannot be made."""
        check_free(path)
        run = cls(path)
        try:
            (path / "checkpoints").mkdir(parents=True)
            run.write_json("settings.json", settings.as_json())
        except OSError as error:
            raise _not_made(path, error) from error
        return run

    def check_writable(self) -> None:
        """Raise `UsageError` if a resumed run could not write its files."""
        folders = (self.path / name for name in ("checkpoints", "tensorboard"))
        try:
            files.check_lock(self.path, "run")
            for folder in (self.path, *filter(os.path.lexists, (*folders, *self.path.glob("tensorboard/*")))):
                files.check_folder(folder)
            for file in (*(self.path / name for name in WRITTEN), *self.path.glob("checkpoints/*.pt")):
                files.check_replaceable(file)
        except OSError as error:
            raise UsageError(
                f"{error.filename or self.path}: cannot be written ({files.reason(error)}): make it writable, or copy "
                f"the folder {self.path} and resume the copy"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into the folder; raises `UsageError` if one does."""
        with ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path, "run", timeout=0))
            except TimeoutError as error:
                raise UsageError(f"{self.path}: another process trains into it: wait until it has ended") from error
            for folder in (self.path, self.path / "checkpoints"):
                files.remove_temporary(folder)
            yield

    def settings(self) -> dict[str, Any]:
        """Return the content of settings.json.

        Raises `UsageError` if it is missing or not the settings of a run, or if an optimizer in it is not registered.
        """
        stored = self.read_json("settings.json")
        if not isinstance(stored, dict) or not stored.keys() >= set(OF_EVERY_RUN):
            got = ", ".join(list(stored)[:6]) if isinstance(stored, dict) else type(stored).__name__
            raise UsageError(
                f"{self.path / 'settings.json'}: expected the settings of a run ({', '.join(OF_EVERY_RUN)}, ...), got "
                f"{got or 'nothing'}: name the folder of a run"
            )
        if missing := [key for key, value in stored.items() if isinstance(value, dict) and key not in OPTIMIZERS]:
            raise UsageError(
                f"{self.path / 'settings.json'}: has settings of {', '.join(missing)}, which is no optimizer of this "
                "installation: use the installation that began the run, or register the optimizer"
            )
        return stored

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file; raises `ValueError` for a number that is not finite."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with files.replacing(self.path / name) as temporary:
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
            return parse(files.read_bytes(file).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{file}: {files.reason(error)}: expected the folder of a run that was started before"
            ) from error

    def add_session(self, machine: dict[str, Any]) -> None:
        """Append the machine of this start to machine.json: a resumed run may be on another machine."""
        before = self.read_json("machine.json") if (self.path / "machine.json").exists() else []
        if not isinstance(before, list):
            raise UsageError(
                f"{self.path / 'machine.json'}: expected a list of starts: delete it to go on without them"
            )
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
        for file in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            file.unlink()
        writer = SummaryWriter(folder, filename_suffix=SUFFIX)
        add_events(writer, record, since=0)
        return writer

    def save_checkpoint(self, name: OptimizerName, state: dict[str, Any]) -> None:
        """Replace the checkpoint of one optimizer; raises `OSError` if it cannot be written."""
        file = self._checkpoint(name)
        file.parent.mkdir(exist_ok=True)
        with files.replacing(file) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # of torch's own writer, which has no other error for a full disk
                raise OSError(errno.EIO, f"the checkpoint is not written: {error}", str(file)) from error

    def load_checkpoint(self, name: OptimizerName) -> dict[str, Any] | None:
        """Return the last checkpoint of one optimizer, on the CPU; None before its first epoch has ended.

        Raises `UsageError` if the file is damaged or holds something else.
        """
        file = self._checkpoint(name)
        if not os.path.lexists(file):
            return None
        try:
            files.check_regular(file)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch documents none for damaged files: zip, pickle and value errors occur
            raise UsageError(
                f"{file}: damaged ({files.reason(error)}): delete it to train {name} from the start"
            ) from error
        if not isinstance(state, dict) or not state.keys() >= {"rows", "steps"}:
            raise UsageError(f"{file}: expected the keys rows and steps: delete it to train {name} from the start")
        return state

    def delete_checkpoint(self, name: OptimizerName) -> None:
        """Delete the checkpoint of one optimizer, and the folder of the checkpoints if nothing else is in it."""
        self._checkpoint(name).unlink(missing_ok=True)
        with suppress(OSError):
            (self.path / "checkpoints").rmdir()

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
    """Raise `UsageError` if ``path`` is not an empty folder, nor one that can be made."""
    try:
        is_empty = path.is_dir() and all(files.is_own(entry.name) for entry in path.iterdir())
        if not os.path.lexists(path) or is_empty:
            files.check_writable(path / "settings.json")
            return
    except OSError as error:
        raise _not_made(path, error) from error
    raise UsageError(f"--out {path}: already there: name a new folder, or resume the run with --resume {path}")


def _not_made(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {path}: cannot be made or written ({files.reason(error)}): name another folder")
