"""What the study runs, in which order: each stage yields cases, and may use the results of the stages before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from studies.optimizers import OURS, RIVALS
from studies.problems import PROBLEMS
from studies.runs import ABLATIONS, SEEDS, Case, Store

FACTORS = (1 / 3, 1, 3)
"""Multiples of TENGraD's default learning rate: all of them must be safe."""
GRID = (0.3, 1, 3, 10)
"""Multiples of a rival's default learning rate, to begin with."""
LADDER = tuple(float(f"{digit}e{power}") for power in range(-4, 5) for digit in (1, 3))
"""Where the grid grows while its best value is at an edge."""


def defaults_of(problem: str, optimizer: str, store: Store) -> Iterator[Case]:
    """Yield every seed of TENGraD with all its learning rates, and of AdamW with its default one."""
    factors = {OURS: FACTORS, "adamw": (1.0,)}.get(optimizer, ())
    yield from (Case(problem, optimizer, factor, seed) for seed in SEEDS for factor in factors)


def grid_of(problem: str, optimizer: str, store: Store) -> Iterator[Case]:
    """Yield all learning rates of a rival with the first seed, and one more for as long as the best is at an edge."""
    if optimizer in RIVALS:
        yield from (Case(problem, optimizer, factor, SEEDS[0]) for factor in grid(problem, optimizer, store))


def tuned_of(problem: str, optimizer: str, store: Store) -> Iterator[Case]:
    """Yield the best learning rate with every seed."""
    best = tuned(problem, optimizer, store)
    yield from (Case(problem, optimizer, best, seed) for seed in SEEDS)


def ablations_of(problem: str, optimizer: str, store: Store) -> Iterator[Case]:
    """Yield TENGraD with one of its defaults changed, on the problems that may choose them."""
    if optimizer == OURS and PROBLEMS[problem].role == "choose":
        yield from (Case(problem, OURS, 1, SEEDS[0], change) for change in ABLATIONS)


STAGES = (defaults_of, grid_of, tuned_of, ablations_of)


def missing(problem: str, chosen: Sequence[str], store: Store) -> Iterator[Case]:
    """Yield the cases of a problem that have no valid run; the caller keeps the run of each before it asks for more."""
    for optimizer in chosen:
        for stage in STAGES:
            while waiting := [c for c in dict.fromkeys(stage(problem, optimizer, store)) if store.run(c) is None]:
                yield waiting[0]


def grid(problem: str, optimizer: str, store: Store) -> tuple[float, ...]:
    """Return the multiples of the learning rate that are tried, in rising order, as far as the results say."""
    if optimizer == OURS:
        return FACTORS
    factors: tuple[float, ...] = GRID
    while True:
        ends = _ends(problem, optimizer, factors, store)
        at = LADDER.index(factors[0]), LADDER.index(factors[-1])
        best = min(ends, key=ends.__getitem__, default=factors[0])  # if all diverged, smaller ones may not
        if _unfinished(problem, optimizer, factors, store) or best not in (factors[0], factors[-1]):
            return factors
        if best == factors[0] and at[0] > 0:
            factors = (LADDER[at[0] - 1], *factors)
        elif best == factors[-1] and at[1] < len(LADDER) - 1:
            factors = (*factors, LADDER[at[1] + 1])
        else:
            return factors


def tuned(problem: str, optimizer: str, store: Store) -> float:
    """Return the factor of the learning rate with the lowest last loss of the first seed."""
    ends = _ends(problem, optimizer, grid(problem, optimizer, store), store)
    return min(ends, key=ends.__getitem__, default=1)


def _ends(problem: str, optimizer: str, factors: Sequence[float], store: Store) -> dict[float, float]:
    runs = [store.run(Case(problem, optimizer, factor, SEEDS[0])) for factor in factors]
    return {run.case.factor: run.loss[-1] for run in runs if run is not None and not run.failure}


def _unfinished(problem: str, optimizer: str, factors: Sequence[float], store: Store) -> bool:
    return any(store.run(Case(problem, optimizer, factor, SEEDS[0])) is None for factor in factors)
