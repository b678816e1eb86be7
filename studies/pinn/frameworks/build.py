"""PINA and DeepXDE as entrants of the study: Adam for a share of the time, then L-BFGS."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from studies.pinn.entrants import Build, Entrant, Family
from studies.pinn.frameworks.equations import Statement, equation_of, state
from studies.pinn.problems.base import Problem
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.training.settings import is_installed

TRIED = ((1e-3, 0.5), (1e-3, 0.1), (1e-2, 0.1))
"The learning rates of Adam, and its shares of the time."


class Training(Protocol):
    """What a framework's module calls ``Training``: a model with a problem, which is trained in stages."""

    def adam(self, lr: float, is_over: Callable[[], bool]) -> None:
        """Train with Adam until ``is_over``, which is asked after each iteration, returns true."""

    def lbfgs(self, is_over: Callable[[], bool]) -> None:
        """Train with L-BFGS until it converges or ``is_over``, which is asked after each iteration, raises an error."""


class Framework(NamedTuple):
    """A framework.

    Attributes:
        title: its name.
        package: the name that it is installed by.
        imported: the name that it is imported by.
    """

    title: str
    package: str
    imported: str


FRAMEWORKS = {
    "pina": Framework("PINA", "pina-mathlab", "pina"),
    "deepxde": Framework("DeepXDE", "deepxde", "deepxde"),
}
INSTALLATION = "pip install 'tengrad-triton[pinn]'"


def is_missing(family: str) -> bool:
    """Return whether a family of entrants is a framework that is not installed."""
    return family in FRAMEWORKS and not is_installed(FRAMEWORKS[family].imported)


def build(name: str, lr: float, share: float, problem: Problem, model: nn.Module) -> Entrant:
    """Return a framework's training, whose one step ends with the time, or when L-BFGS converges.

    Args:
        name: a key of ``FRAMEWORKS``.
        lr: the learning rate of Adam.
        share: its share of the time; L-BFGS has the rest.
        problem: the problem.
        model: its network.

    Raises:
        UsageError: the framework is not installed, or DeepXDE runs on another backend than PyTorch.
        ValueError: the problem's equation is not written for it.
    """
    equation_of(problem)
    training = load(name)
    used = 0.0

    def schedule(share_used: float) -> None:
        nonlocal used
        used = share_used

    def is_adam_over() -> bool:
        entrant.pause()
        return used >= share

    def is_over() -> bool:
        entrant.pause()  # raises at the end of the time
        return False

    def step(points: Mapping[str, Any]) -> None:
        run = training(state(problem, model, points), model)
        if used < share:
            run.adam(lr, is_adam_over)
        run.lbfgs(is_over)

    framework = FRAMEWORKS[name]
    setting = (
        f"version {version(framework.package)}, Adam with lr {lr:g} for {share:.0%} of the time, then L-BFGS with "
        "history 100 and strong Wolfe, the same points throughout"
    )
    entrant = Entrant(framework.title, setting, step, fixed_points=True, schedule=schedule, loops=True)
    return entrant


def load(name: str) -> Callable[[Statement, nn.Module], Training]:
    """Import a framework and return what trains with it; errors are those of `build`."""
    if is_missing(name):
        raise UsageError(f"{name} needs the package {FRAMEWORKS[name].package}, which is not installed: {INSTALLATION}")
    with _settings_kept():
        return importlib.import_module(f"studies.pinn.frameworks.{name}").Training


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Undo what the frameworks do when they are imported: they greet, show all warnings, and take a GPU for torch's."""
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    device, line_of = torch.get_default_device(), warnings.formatwarning
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            yield
    finally:
        warnings.formatwarning = line_of
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def family(name: str) -> Family:
    """Return a framework with all settings that are tried."""
    return {f"lr-{lr:g}-adam-{share:g}": partial(build, name, lr, share) for lr, share in TRIED}


FAMILIES: dict[str, dict[str, Build]] = {name: dict(family(name)) for name in FRAMEWORKS}
