"""From arguments to a run: the frozen settings are the flags, in both directions."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.config import Dict
from rich.console import Console

from tengrad_triton.recipes import experiment
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.run import RunFolder
from tengrad_triton.recipes.settings import Settings


@dataclass(frozen=True)
class Request:
    """What `tengrad-triton train` was asked for."""

    settings: Settings
    out: Path | None
    resume: Path | None


def train(*, settings: Settings = Settings(), out: Path | None = None, resume: Path | None = None) -> Request:  # noqa: B008
    """Train a model with one or several optimizers and compare them.

    Each optimizer starts from the same weights and sees the same batches. The run's folder gets the settings, the
    metrics (CSV, JSON, TensorBoard), figures, and a checkpoint an optimizer.

    Parameters
    ----------
    settings
        One flag a field.
    out
        New folder of the run; runs/<dataset>-<model>-<time> if not given.
    resume
        Folder of an interrupted run to go on with, by its own settings.
    """
    return Request(settings, out, resume)


def run(arguments: list[str]) -> None:
    """Do what the arguments say; raises `UsageError` if it cannot be done, and `InterruptedRunError` on Ctrl-C."""
    request = _parsed(arguments)
    if request is None:  # the help or the version, which cyclopts has shown
        return
    console = Console()
    if request.resume is None:
        experiment.start(request.settings, request.out, console)
    else:
        folder = RunFolder(request.resume)
        experiment.resume(_stored_settings(arguments, request, folder), folder, console)


def _parsed(arguments: list[str], config: tuple[Dict, ...] = ()) -> Request | None:
    app = App(
        name="tengrad-triton",
        help="Exact natural-gradient steps for PyTorch.",
        config=config,
        suppress_keyboard_interrupt=False,
        help_format="plaintext",
    )
    app.version = version("tengrad-triton")
    app.command(train)
    try:
        request: Request | None = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        raise UsageError(f"{error} See tengrad-triton train --help.") from error
    return request


def _stored_settings(arguments: list[str], request: Request, folder: RunFolder) -> Settings:
    """Return the settings of a folder; raises `UsageError` if a flag says something else."""
    if request.out is not None:
        raise UsageError(f"--out {request.out}: --resume goes on in {folder.path}: drop one of the two")
    config = Dict(
        folder.read_json("settings.json"), use_commands_as_keys=False, source=str(folder.path / "settings.json")
    )
    stored, asked = _parsed(["train"], (config,)), _parsed(arguments, (config,))
    assert stored is not None
    assert asked is not None
    theirs, ours = _flags(stored.settings.plain()), _flags(asked.settings.plain())
    for flag in sorted(theirs | ours):
        if theirs.get(flag) != ours.get(flag):
            got, expected = ours.get(flag), theirs.get(flag)
            raise UsageError(f"{flag} {got}: this run has {expected}: drop the flag, or start anew without --resume")
    return stored.settings


def _flags(plain: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return nested settings by their flags: {"sgd": {"lr": 1}} is {"--sgd.lr": 1}."""
    flags: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{prefix}{key.replace('_', '-')}"
        flags |= _flags(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flags
