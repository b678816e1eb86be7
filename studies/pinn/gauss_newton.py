"""Ours: `GaussNewton` with its default settings on every problem, and the same compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from studies.pinn.entrants import Build, Entrant
from studies.pinn.problems.base import Problem
from tengrad_triton import GainRatio, GaussNewton


def build(problem: Problem, model: nn.Module, **settings: Any) -> Entrant:
    """Return `GaussNewton`, with the defaults of all settings that are not given."""
    optimizer = GaussNewton(model, problem.terms(model), weights=problem.weights, **settings)
    words = ", ".join(f"{name} {value}" for name, value in settings.items()) or "the defaults"
    name = "GaussNewton, compiled" if settings.get("compiled") else "GaussNewton"
    return Entrant(name, words, lambda points: optimizer.step(**points))


def damped(damping: float) -> Build:
    """Return what builds it with another first damping."""
    return lambda problem, model: build(problem, model, damping=GainRatio(start=damping))


FAMILIES: dict[str, dict[str, Build]] = {
    "gauss-newton": {"defaults": build},
    "gauss-newton-compiled": {"compiled": partial(build, compiled=True)},
}
DAMPED: dict[str, Callable[[float], Build]] = {"gauss-newton": damped}
