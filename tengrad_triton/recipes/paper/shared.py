"""What all runs and measurements of the command share."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from rich.console import Console

from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.data.registry import DatasetName, load
from tengrad_triton.recipes.paper.progress import Tell, telling
from tengrad_triton.recipes.paper.request import Request
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class Shared:
    """The request, the terminal, the device, and each data set, which is loaded once."""

    request: Request
    console: Console
    device: torch.device
    loaded: dict[tuple[DatasetName, int | None, int | None], Data] = field(default_factory=dict)

    def job(self, settings: Settings) -> Job:
        """Return the job of a run; raises `UsageError` if its data cannot be read."""
        key = (settings.dataset, settings.train_limit, settings.test_limit)
        if key not in self.loaded:
            self.say(f"loading {settings.dataset}")
            self.loaded[key] = load(settings.dataset, settings.data, *key[1:], self.console).to(self.device)
        return Job(settings, self.loaded[key], self.device)

    def load(self, every: Iterable[Settings]) -> None:
        """Load the data of all settings, so that a mistake in --data ends the command before it measures anything."""
        for settings in every:
            self.job(settings)

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True, highlight=False)

    def telling(self, what: str, total: int) -> AbstractContextManager[Tell]:
        """Return `progress.telling` on this terminal."""
        return telling(self.console, what, total)
