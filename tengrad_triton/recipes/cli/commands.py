"""The commands: their arguments as typed values, and what each does with them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, ValidationError
from cyclopts.config import Dict
from cyclopts.types import PositiveInt

from tengrad_triton import __version__
from tengrad_triton.recipes.cli import autotune as plans
from tengrad_triton.recipes.cli import report as pages
from tengrad_triton.recipes.cli import train as runs
from tengrad_triton.recipes.cli.autotune import AutotuneSettings
from tengrad_triton.recipes.cli.help import WholeFlags, description_of
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.paper.execute import execute
from tengrad_triton.recipes.paper.published import described_rates, rates
from tengrad_triton.recipes.paper.request import KNOWN, Request, check_target
from tengrad_triton.recipes.terminal import new_console
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class TrainCommand:
    """The arguments of `tengrad-triton train`."""

    settings: Settings
    out: Path | None
    resume: Path | None


@dataclass(frozen=True)
class ReportCommand:
    """The arguments of `tengrad-triton report`."""

    run: Path
    to: Path


@dataclass(frozen=True)
class ShowPlanCommand:
    """The arguments of `tengrad-triton plan show`."""

    plan: Path | None
    refresh_every: int


@dataclass(frozen=True)
class PaperCommand:
    """The arguments of `tengrad-triton paper`."""

    targets: tuple[str, ...]
    request: Request


Command = TrainCommand | ReportCommand | AutotuneSettings | ShowPlanCommand | PaperCommand


def train(*, settings: Settings = Settings(), out: Path | None = None, resume: Path | None = None) -> TrainCommand:  # noqa: B008
    """Train a model with one or several optimizers and compare them.

    All optimizers start from the same weights and see the same batches. The folder of the run gets the settings, the
    metrics (CSV, JSON, TensorBoard), figures, and a checkpoint for each optimizer.

    Parameters
    ----------
    settings
        One flag for each field.
    out
        New folder of the run; runs/<dataset>-<model>-<time> if not given.
    resume
        Folder of an interrupted run to resume, with its own settings.
    """
    return TrainCommand(settings, out, resume)


def report(run: Path, /, *, to: Path) -> ReportCommand:
    """Write a Markdown page about a run, with its figures beside it.

    The page has the settings, the machine, the results and the command that repeats the run.

    Parameters
    ----------
    run
        Folder of the run.
    to
        File of the page, such as docs/NAME.md; its figures become docs/NAME-loss.png and so on.
    """
    return ReportCommand(run, to)


def autotune(*, settings: AutotuneSettings = AutotuneSettings()) -> AutotuneSettings:  # noqa: B008
    """Measure how to store and compute the curvature of each weight on this device, and keep the plan in a file.

    Parameters
    ----------
    settings
        One flag for each field.
    """
    return settings


def plan(action: Literal["show"], file: Path | None = None, /, *, refresh_every: PositiveInt = 100) -> ShowPlanCommand:
    """Show a plan file.

    Parameters
    ----------
    action
        What to do with it.
    file
        The plan file; that of this device if not given.
    refresh_every
        Steps between two refreshes.
    """
    assert action == "show"
    return ShowPlanCommand(file, refresh_every)


def paper(
    *targets: Annotated[str, Parameter(validator=check_target)],
    request: Request = Request(),  # noqa: B008
) -> PaperCommand:
    """Run the paper's experiments, and write a report with the paper's numbers beside ours.

    Targets: table1, table2, figure1, figure4 to figure15, tables3-5, phases, memory, or all.

    Parameters
    ----------
    targets
        The tables and figures, named as in the paper.
    request
        One flag for each field.
    """
    if not targets:
        raise UsageError(f"paper: no target: name one or several of {KNOWN}")
    return PaperCommand(targets, request)


HELP = """Exact natural-gradient steps for PyTorch.

Start with tengrad-triton train. tengrad-triton COMMAND --help lists the flags of a command."""
COMMANDS: dict[str, Callable[..., Command]] = {
    "train": train,
    "report": report,
    "autotune": autotune,
    "plan": plan,
    "paper": paper,
}


def run(arguments: list[str]) -> None:
    """Run a command; raises `UsageError` if it cannot be carried out, and `InterruptedRunError` on Ctrl-C."""
    console = new_console()
    match parse(arguments):
        case ReportCommand(path, to):
            _report(RunFolder(path), to)
            console.print(f"page: {to}", soft_wrap=True)
        case AutotuneSettings() as settings:
            plans.tune(settings, console)
        case ShowPlanCommand(path, refresh_every):
            plans.show(path, refresh_every, console)
        case PaperCommand(targets, request):
            execute(targets, request, arguments, console)
        case TrainCommand(settings, out, None):
            runs.start(settings, out, console)
        case TrainCommand(_, out, Path() as path):
            folder = RunFolder(path)
            runs.resume(_resumed_settings(arguments, out, folder), folder, console)
        case None:  # cyclopts has shown the help or the version
            pass


def _report(folder: RunFolder, to: Path) -> None:
    stored = folder.settings()
    local = stored.pop("data", None) is not None  # the folder may be gone, and no page names a folder of this machine
    for own in (own for own in stored.values() if isinstance(own, dict)):
        own.pop("plan", None)  # it changes times and rounding only
    pages.write(pages.read(folder, _train_command(["train"], folder, stored).settings, local), to)


def _resumed_settings(arguments: list[str], out: Path | None, folder: RunFolder) -> Settings:
    """Return the settings of a folder; raises `UsageError` if a flag contradicts them."""
    if out is not None:
        raise UsageError(f"--out {out}: --resume goes on in {folder.path}: drop one of the two")
    stored = folder.settings()
    settings = _train_command(["train"], folder, stored).settings
    kept, given = settings.flags(), _train_command(arguments, folder, stored).settings.flags()
    for flag in sorted(kept | given):
        if kept.get(flag) != given.get(flag):
            got, expected = given.get(flag), kept.get(flag)
            raise UsageError(f"{flag} {got}: this run has {expected}: drop the flag, or start anew without --resume")
    return settings


def _train_command(arguments: list[str], folder: RunFolder, stored: dict[str, Any]) -> TrainCommand:
    """Return the arguments of `train`, with the settings of a folder as the defaults."""
    config = Dict(stored, use_commands_as_keys=False, source=str(folder.path / "settings.json"))
    command = parse(arguments, (config,))
    assert isinstance(command, TrainCommand)
    return command


def parse(arguments: list[str], config: tuple[Dict, ...] = ()) -> Command | None:
    """Return the command that the arguments name, or None for help and version, which cyclopts shows.

    Without a ``config``, the defaults of `train` are those of the data set that the arguments name. Raises `UsageError`
    if an argument is unknown or has a wrong value.
    """
    command = _parsed(arguments, config)
    if config or not isinstance(command, TrainCommand):
        return command
    asked = command.settings
    tuned = Dict(rates(asked.dataset, asked.model), use_commands_as_keys=False, source=f"rates for {asked.dataset}")
    return _parsed(arguments, (tuned,))


def _help_of_train() -> str:
    """Return the description of `train`, with the rates for each data set."""
    return "\n\n".join(
        [
            description_of(train),
            "Learning rate, weight decay and damping depend on the data set, unless you give them. The defaults of the "
            "flags are those for digits. Other data sets have the following, in this order: what the paper tuned, and "
            "torch's for adamw. On CIFAR densenet and mobilenetv2 have the paper's values for them.",
            *described_rates(),
        ]
    )


def _parsed(arguments: list[str], config: tuple[Dict, ...]) -> Command | None:
    app = App(
        name="tengrad-triton",
        help=HELP,
        config=config,
        suppress_keyboard_interrupt=False,
        help_format="plaintext",
        help_formatter=WholeFlags(),
    )
    app.version = __version__
    for place, (name, command) in enumerate(COMMANDS.items()):
        described = _help_of_train() if name == "train" else description_of(command)
        app.command(command, help=described, sort_key=place)
    try:
        parsed: Command | None = app(
            arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        known = [word for word in arguments[:1] if word in COMMANDS]
        raise UsageError(f"{_sentence(error)} See {' '.join(['tengrad-triton', *known])} --help.") from error
    return parsed


def _sentence(error: CycloptsError) -> str:
    """Return what an error says, with a full stop; without the value of a wrong argument, which our errors name."""
    text = str(error)
    if isinstance(error, ValidationError) and error.argument is not None and error.exception_message:
        text = f"{error.argument.name}: {error.exception_message}"
    return f"{text.rstrip('.')}."
