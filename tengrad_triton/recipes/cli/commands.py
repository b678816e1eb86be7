"""From arguments to a run: the frozen settings are the flags, in both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict
from cyclopts.types import PositiveInt
from rich.console import Console

from tengrad_triton.recipes.cli import autotune as tuning
from tengrad_triton.recipes.cli import report as pages
from tengrad_triton.recipes.cli.autotune import Tuning
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.paper.execute import execute
from tengrad_triton.recipes.paper.request import TARGETS, Asked, known_target
from tengrad_triton.recipes.training import run as experiment
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class Training:
    """What `tengrad-triton train` was asked for."""

    settings: Settings
    out: Path | None
    resume: Path | None


@dataclass(frozen=True)
class Reporting:
    """What `tengrad-triton report` was asked for."""

    run: Path
    to: Path


def train(*, settings: Settings = Settings(), out: Path | None = None, resume: Path | None = None) -> Training:  # noqa: B008
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
    return Training(settings, out, resume)


def report(run: Path, /, *, to: Path) -> Reporting:
    """Write a Markdown page about a run, with its figures beside it.

    The page has the settings, the machine, the results and the command that runs it again.

    Parameters
    ----------
    run
        Folder of the run.
    to
        The page, such as docs/NAME.md; its figures become docs/NAME-loss.png and so on.
    """
    return Reporting(run, to)


@dataclass(frozen=True)
class Showing:
    """What `tengrad-triton plan show` was asked for."""

    plan: Path | None
    refresh_every: int


def autotune(*, asked: Tuning = Tuning()) -> Tuning:  # noqa: B008
    """Measure how to serve each weight of a model on this device, and keep it in the device's plan file.

    Parameters
    ----------
    asked
        One flag a field.
    """
    return asked


def plan(action: Literal["show"], file: Path | None = None, /, *, refresh_every: PositiveInt = 100) -> Showing:
    """Show a plan file.

    Parameters
    ----------
    action
        What to do with it.
    file
        The plan file; this device's own if not given.
    refresh_every
        Steps that share a refresh.
    """
    assert action == "show"
    return Showing(file, refresh_every)


@dataclass(frozen=True)
class Papering:
    """What `tengrad-triton paper` was asked for."""

    targets: tuple[str, ...]
    asked: Asked


def paper(
    *targets: Annotated[str, Parameter(validator=known_target)],
    asked: Asked = Asked(),  # noqa: B008
) -> Papering:
    """Run the paper's experiments, and write a report with its numbers beside ours.

    Targets: table1, table2, figure1, figure4 to figure15, tables3-5, phases, memory, or all.

    Parameters
    ----------
    targets
        The tables and figures, named as in the paper.
    asked
        One flag a field.
    """
    if not targets:
        raise UsageError(f"paper: no target: name one or several of {', '.join(TARGETS)}")
    return Papering(targets, asked)


Request = Training | Reporting | Tuning | Showing | Papering
COMMANDS: dict[str, Callable[..., Request]] = {
    "train": train,
    "report": report,
    "autotune": autotune,
    "plan": plan,
    "paper": paper,
}


def run(arguments: list[str]) -> None:
    """Do what the arguments say; raises `UsageError` if it cannot be done, and `InterruptedRunError` on Ctrl-C."""
    console = Console()
    match _parsed(arguments):
        case Reporting(path, to):
            _report(RunFolder(path), to)
        case Tuning() as asked:
            tuning.tune(asked, console)
        case Showing(path, refresh_every):
            tuning.show(path, refresh_every, console)
        case Papering(targets, asked):
            execute(targets, asked, arguments, console)
        case Training(settings, out, None):
            experiment.start(settings, out, console)
        case Training(_, out, Path() as path):
            folder = RunFolder(path)
            experiment.resume(_agreed_settings(arguments, out, folder), folder, console)
        case None:  # the help or the version, which cyclopts has shown
            pass


def _report(folder: RunFolder, to: Path) -> None:
    stored = _stored(folder)
    local = stored.pop("data", None) is not None  # it need not be here any more, and no page says where it was
    if isinstance(stored.get("tengrad"), dict):
        stored["tengrad"].pop("plan", None)  # changes times and rounding only
    pages.write(pages.read(folder, _training(["train"], folder, stored).settings, local), to)


def _agreed_settings(arguments: list[str], out: Path | None, folder: RunFolder) -> Settings:
    """Return the settings of a folder; raises `UsageError` if a flag says something else."""
    if out is not None:
        raise UsageError(f"--out {out}: --resume goes on in {folder.path}: drop one of the two")
    stored = _stored(folder)
    settings = _training(["train"], folder, stored).settings
    theirs, ours = settings.flags(), _training(arguments, folder, stored).settings.flags()
    for flag in sorted(theirs | ours):
        if theirs.get(flag) != ours.get(flag):
            got, expected = ours.get(flag), theirs.get(flag)
            raise UsageError(f"{flag} {got}: this run has {expected}: drop the flag, or start anew without --resume")
    return settings


def _stored(folder: RunFolder) -> dict[str, Any]:
    stored = folder.read_json("settings.json")
    if not isinstance(stored, dict):
        raise UsageError(f"{folder.path / 'settings.json'}: expected the settings of a run, got {stored}")
    return stored


def _training(arguments: list[str], folder: RunFolder, stored: dict[str, Any]) -> Training:
    """Return what is asked for where the defaults are those of a folder."""
    config = Dict(stored, use_commands_as_keys=False, source=str(folder.path / "settings.json"))
    request = _parsed(arguments, (config,))
    assert isinstance(request, Training)
    return request


def _parsed(arguments: list[str], config: tuple[Dict, ...] = ()) -> Request | None:
    app = App(
        name="tengrad-triton",
        help="Exact natural-gradient steps for PyTorch.",
        config=config,
        suppress_keyboard_interrupt=False,
        help_format="plaintext",
    )
    app.version = version("tengrad-triton")
    for command in COMMANDS.values():
        app.command(command)
    try:
        request: Request | None = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        known = [word for word in arguments[:1] if word in COMMANDS]
        raise UsageError(f"{error} See {' '.join(['tengrad-triton', *known])} --help.") from error
    return request
