"""Ours: `GaussNewton` with its default settings on every problem, the same compiled, and with fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from studies.pinn.entrants import Build, Entrant
from studies.pinn.problems.base import Problem
from tengrad_triton import GainRatio, GaussNewton

ROWS = (300, 1000)


def build(problem: Problem, model: nn.Module, name: str = "GaussNewton", **settings: Any) -> Entrant:
    """Return `GaussNewton` as ``name``, with the defaults of all settings that are not given."""
    optimizer = GaussNewton(model, problem.terms(model), weights=problem.weights, **settings)
    words = ", ".join(f"{key} {value}" for key, value in settings.items()) or "the defaults"
    return Entrant(name, words, lambda points: optimizer.step(**points))


def damped(damping: float) -> Build:
    """Return what builds it with another first damping."""
    return lambda problem, model: build(problem, model, damping=GainRatio(start=damping))


FAMILIES: dict[str, dict[str, Build]] = {
    "gauss-newton": {"defaults": build},
    "gauss-newton-compiled": {"compiled": partial(build, name="GaussNewton, compiled", compiled=True)},
    "gauss-newton-rows": {f"{rows}": partial(build, name="GaussNewton, some rows", max_rows=rows) for rows in ROWS},
}
DAMPED: dict[str, Callable[[float], Build]] = {"gauss-newton": damped}
