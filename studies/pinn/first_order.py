"""Entrants from torch: Adam with a falling learning rate, and L-BFGS with a line search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from studies.pinn.entrants import Build, Entrant
from studies.pinn.problems.base import Problem, loss

RATES = (1e-3, 3e-3, 1e-2)
ITERATIONS = 10  # of L-BFGS in a step, which evaluates the loss once more than they need
HISTORIES = (150,)


def adam(lr: float, problem: Problem, model: nn.Module) -> Entrant:
    """Return Adam, whose learning rate falls from ``lr`` to 0 over the time of the run, as a cosine does."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    terms = problem.terms(model)

    def step(points: Mapping[str, Any]) -> None:
        optimizer.zero_grad()
        loss(problem, terms, dict(points)).backward()
        optimizer.step()

    def schedule(share: float) -> None:
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * share)) / 2

    return Entrant("Adam", f"lr {lr:g}, falls to 0 as a cosine", step, schedule=schedule)


def lbfgs(history: int, problem: Problem, model: nn.Module) -> Entrant:
    """Return L-BFGS with the strong Wolfe conditions and no tolerances; a step is ten iterations."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=ITERATIONS,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    terms = problem.terms(model)

    def step(points: Mapping[str, Any]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(problem, terms, dict(points))
            value.backward()
            return value

        optimizer.step(closure)

    setting = f"history {history}, strong Wolfe, {ITERATIONS} iterations a step, the same points throughout"
    return Entrant("L-BFGS", setting, step, fixed_points=True)


FAMILIES: dict[str, dict[str, Build]] = {
    "adam": {f"cosine-{lr:g}": partial(adam, lr) for lr in RATES},
    "lbfgs": {f"history-{history}": partial(lbfgs, history) for history in HISTORIES},
}
