"""The rivals as entrants of the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from studies.pinn.entrants import Build, Entrant, Family
from studies.pinn.problems.base import Problem
from studies.pinn.rivals import published
from studies.pinn.rivals.descent import Rival
from studies.pinn.rivals.engd import Engd
from studies.pinn.rivals.kfac import Kfac
from studies.pinn.rivals.published import Published, settings_of
from studies.pinn.rivals.squares import least_squares
from studies.pinn.rivals.woodbury import Woodbury

DAMPINGS = (1e-8, 1e-6, 1e-4)
"Dampings to try where nobody published one."

Kind = Callable[..., Rival]
RIVALS: dict[str, tuple[Kind, Mapping[str, Published]]] = {
    "engd": (Engd, published.ENGD),
    "engd-per-layer": (partial(Engd, per_layer=True), published.ENGD_PER_LAYER),
    "kfac": (Kfac, published.KFAC_SEARCHED),
    "kfac-star": (partial(Kfac, automatic=True), published.KFAC_AUTOMATIC),
    "engd-w": (Woodbury, published.ENGD_W),
    "engd-w-fixed": (Woodbury, published.ENGD_W_FIXED),
    "spring": (Woodbury, published.SPRING),
    "spring-fixed": (Woodbury, published.SPRING_FIXED),
}
"The class and the published settings of each rival."
TITLES = {
    "engd": "ENGD",
    "engd-per-layer": "ENGD per layer",
    "kfac": "KFAC",
    "kfac-star": "KFAC, automatic rate",
    "engd-w": "ENGD-W",
    "engd-w-fixed": "ENGD-W, fixed rate",
    "spring": "SPRING",
    "spring-fixed": "SPRING, fixed rate",
}
"The name of each rival on the page; W is Woodbury's form."


def build(name: str, problem: Problem, model: nn.Module, **changed: Any) -> Entrant:
    """Return a rival with its published settings for a problem.

    Args:
        name: a key of ``RIVALS``.
        problem: the problem.
        model: its network.
        changed: settings to take instead of published ones.

    Raises:
        ValueError: if the rival cannot take the problem.
    """
    kind, table = RIVALS[name]
    found = settings_of(table, problem.name)
    settings = {**found.settings, **changed}
    rival = kind(least_squares(problem, model), **settings)
    words = ", ".join(f"{key} {_word(value)}" for key, value in settings.items())
    source = found.source if not found.note else f"{found.source}; {found.note}"
    step = rival.step if found.keep == 1 else _kept(rival.step, found.keep)
    return Entrant(name, f"{words} ({source})", step)


def family(name: str) -> Family:
    """Return a rival with its published settings, and, of ENGD-W and SPRING, with dampings for all other problems."""
    tried: dict[str, Build] = {"published": partial(build, name)}
    if RIVALS[name][0] is Woodbury:
        tried |= {f"{damping:g}": damped(name, damping) for damping in DAMPINGS}
    return tried


def damped(name: str, damping: float) -> Build:
    """Return what builds a rival with another damping."""
    return partial(build, name, damping=damping)


FAMILIES: dict[str, Family] = {name: family(name) for name in RIVALS}
DAMPED: dict[str, Callable[[float], Build]] = {name: partial(damped, name) for name in RIVALS}


def _word(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _kept(step: Callable[[Mapping[str, Any]], None], steps: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a step that keeps its points for so many steps, as the published run did."""
    held: dict[str, Any] = {}
    count = 0

    def kept(points: Mapping[str, Any]) -> None:
        nonlocal count
        if count % steps == 0:
            held.update(points)
        count += 1
        step(held)

    return kept
