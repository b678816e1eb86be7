"""The Markdown page of a run: a pure function of the content of its folder."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS, flag
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.reports.comparison import OUTCOME, STEP_TIME, outcomes, step_times
from tengrad_triton.recipes.reports.markdown import block, bullets, machine_table, table
from tengrad_triton.recipes.reports.run_figures import WINDOW, figures_of
from tengrad_triton.recipes.training.metrics import History
from tengrad_triton.recipes.training.settings import Settings

GENERATED = "<!-- Written by `tengrad-triton report`: changes by hand are lost. -->"
CAPTIONS = {
    "loss": "Cross-entropy by epoch and by training time.",
    "accuracy": "Accuracy by epoch and by training time.",
    "steps": f"Training loss and accuracy within the epochs, each point the mean of {WINDOW} steps.",
}
OUTCOME_NOTE = (
    "Times are those of training, after a warm-up and without the evaluations; that of an epoch is the median."
)
STEP_NOTE = "Medians. The time of a step starts at the end of the step before it."
GPU_NOTE = "Times of single steps are left out: steps.csv has the host's times, which on CUDA are not the device's."


@dataclass(frozen=True)
class Run:
    """The content of a run's folder.

    Attributes:
        settings: without ``data``, because a page must not name a folder of this machine.
        local_data: whether the run had --data.
        sessions: the entries of machine.json, one for each start.
        history: the metrics.
        summaries: the summary of the parameters of each TENGraD that took part.
    """

    settings: Settings
    local_data: bool
    sessions: list[dict[str, Any]]
    history: History
    summaries: Mapping[OptimizerName, str]

    @property
    def title(self) -> str:
        """The title of the page: the model and the data."""
        return self.settings.title(self.sessions[-1]["train_images"])


def markdown(run: Run, stem: str) -> str:
    """Return the page. It links to the figures that `run_figures.draw` writes with the prefix ``stem-``."""
    sections: list[Sequence[str]] = [
        [GENERATED, f"# {run.title}", *_unfinished(run)],
        [table(OUTCOME, outcomes(run.history)), OUTCOME_NOTE],
        [f"![{CAPTIONS[figure]}]({quote(f'{stem}-{figure}.png')})" for figure in figures_of(run.history)],
        ["## Time of a step", *_step_times(run)],
        ["## What was run", bullets(_setup(run) | _optimizers(run)), "To run it again:", block(_command(run), "bash")],
        ["## Where", machine_table(run.sessions)],
    ]
    for name, summary in run.summaries.items():
        sections.append([f"## What {name} does with each parameter", block(summary.rstrip(), "text")])
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _unfinished(run: Run) -> list[str]:
    """Return a paragraph that names optimizers with fewer epochs than the settings: interrupted or diverged ones."""
    epochs = {name: len(run.history[name].epochs) if name in run.history else 0 for name in run.settings.optimizer}
    short = [
        f"{name} has {count} of {run.settings.epochs} epochs"
        for name, count in epochs.items()
        if count < run.settings.epochs
    ]
    return [f"**The run is not complete: {', '.join(short)}.**"] if short else []


def _step_times(run: Run) -> list[str]:
    if any(session["device_type"] != "cpu" for session in run.sessions):
        return [GPU_NOTE]
    refreshes = {name: run.settings.of(name).refreshes(len(record.steps)) for name, record in run.history.items()}
    return [table(STEP_TIME, step_times(run.history, refreshes)), STEP_NOTE]


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
    """Return the command with every setting of the run, so that later defaults do not matter."""
    flags = run.settings.flags() | ({"--data": "DIR"} if run.local_data else {})
    of_one = {name: f"{flag(name)}." for name in OPTIMIZERS}
    shared = [flag for flag in flags if not flag.startswith(tuple(of_one.values()))]
    lines = [shared, *([flag for flag in flags if flag.startswith(of_one[name])] for name in run.settings.optimizer)]
    given = (" ".join(f"{flag} {_words(flags[flag])}" for flag in line) for line in lines)
    return "tengrad-triton train " + " \\\n    ".join(given)


def _words(value: object) -> str:
    return shlex.join(map(str, value if isinstance(value, list) else [value]))
