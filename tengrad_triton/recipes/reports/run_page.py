"""The Markdown page of a run: a pure function of what its folder holds."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args
from urllib.parse import quote

from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.reports.comparison import OUTCOME, STEP_TIME, outcomes, step_times
from tengrad_triton.recipes.reports.run_figures import FIGURES, WINDOW
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.settings import Settings

GENERATED = "<!-- Written by `tengrad-triton report`: changes by hand are lost. -->"
CAPTIONS = {
    "loss": "Cross-entropy by epoch and by training time.",
    "accuracy": "Accuracy by epoch and by training time.",
    "steps": f"Training loss and accuracy within the epochs, each point the mean of {WINDOW} steps.",
}
OUTCOME_NOTE = "Times are those of training, after a warm-up and without the evaluations; an epoch's is the median."
STEP_NOTE = "Medians. A step's time goes from the end of the step before it to its own."
GPU_NOTE = "Times of single steps are left out: the host's, which steps.csv keeps, are not those of the device on CUDA."


@dataclass(frozen=True)
class Run:
    """What a page is made of."""

    settings: Settings  # without `data`: where local data lie is nobody's business
    local_data: bool  # whether they were given by --data
    sessions: list[dict[str, Any]]  # what machine.json has of each start
    history: History
    summary: str | None  # TENGraD's

    @property
    def title(self) -> str:
        """What was trained on what."""
        return self.settings.title(self.sessions[-1]["train_images"])


def markdown(run: Run, stem: str) -> str:
    """Return the page, which links to the figures that `draw` writes with the prefix `stem`-."""
    sections: list[Sequence[str]] = [
        [GENERATED, f"# {run.title}", *_unfinished(run)],
        [table(OUTCOME, outcomes(run.history)), OUTCOME_NOTE],
        [f"![{CAPTIONS[figure]}]({quote(f'{stem}-{figure}.png')})" for figure in FIGURES],
        ["## Time of a step", *_step_times(run)],
        ["## What was run", bullets(_setup(run) | _optimizers(run)), "To run it again:", block(_command(run), "bash")],
        ["## Where", machine(run.sessions)],
    ]
    if run.summary is not None:
        sections.append(["## What TENGraD does with each parameter", block(run.summary.rstrip(), "text")])
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _unfinished(run: Run) -> list[str]:
    """Say which optimizers have fewer epochs than were asked for: the run was halted, or the loss diverged."""
    epochs = {name: len(run.history[name].rows) if name in run.history else 0 for name in run.settings.optimizer}
    short = [
        f"{name} has {count} of {run.settings.epochs} epochs"
        for name, count in epochs.items()
        if count < run.settings.epochs
    ]
    return [f"**Not all of it was run: {', '.join(short)}.**"] if short else []


def _step_times(run: Run) -> list[str]:
    if any(session["device_type"] != "cpu" for session in run.sessions):
        return [GPU_NOTE]
    return [table(STEP_TIME, step_times(run.history, run.settings.tengrad.refresh_every)), STEP_NOTE]


def _setup(run: Run) -> dict[str, object]:
    settings, last = run.settings, run.sessions[-1]
    return {
        "model": f"{settings.model}, width {settings.channels}",
        "data": f"{settings.dataset}, {last['train_images']} images to train with and {last['test_images']} to test",
        "batch": f"{settings.batch_size} images",
        "epochs": settings.epochs,
        **({"learning rates": f"× {settings.decay} after epochs {_decays(settings)}"} if settings.decay_at else {}),
        "seed": settings.seed,
    }


def _decays(settings: Settings) -> str:
    return ", ".join(map(str, settings.decay_at))


def _optimizers(run: Run) -> dict[str, object]:
    settings = {name: asdict(run.settings)[name] for name in run.settings.optimizer}
    given = {name: {key: value for key, value in of.items() if value is not None} for name, of in settings.items()}
    return {name: ", ".join(f"{key} {value}" for key, value in of.items()) for name, of in given.items()}


def _command(run: Run) -> str:
    """Return the command with every setting that the run depends on, whatever the defaults become."""
    flags = run.settings.flags() | ({"--data": "DIR"} if run.local_data else {})
    of_one = {name: f"--{name.replace('_', '-')}." for name in get_args(OptimizerName)}
    shared = [flag for flag in flags if not flag.startswith(tuple(of_one.values()))]
    lines = [shared, *([flag for flag in flags if flag.startswith(of_one[name])] for name in run.settings.optimizer)]
    given = (" ".join(f"{flag} {_words(flags[flag])}" for flag in line) for line in lines)
    return "tengrad-triton train " + " \\\n    ".join(given)


def _words(value: object) -> str:
    return shlex.join(map(str, value if isinstance(value, list) else [value]))


def machine(sessions: Sequence[dict[str, Any]]) -> str:
    """Return a column for each time that the run was started or resumed."""
    keys = [key for key in sessions[0] if not key.endswith("_images")]
    rows = [(key, *(cell(session.get(key)) for session in sessions)) for key in keys]
    return table(("", *(f"start {number}" for number in range(1, len(sessions) + 1))), rows)


def cell(value: Any) -> str:
    """Return one entry of machine.json as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items())
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (heading, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: dict[str, object]) -> str:
    """Return a Markdown list of names and values."""
    return "\n".join(f"- {key}: {value}" for key, value in items.items())


def block(text: str, language: str) -> str:
    """Return text as a block of code."""
    return f"```{language}\n{text}\n```"
