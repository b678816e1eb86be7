"""The time of a step. The optimizers take a few steps each in turn, so that other load affects all alike."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from studies.optimizers import NAMES, OURS, close
from studies.problems import PROBLEMS
from studies.runs import Case, start, step

TURNS, STEPS = 8, 10  # a turn of TENGraD begins with a refresh


def settings(problem: str) -> dict[str, dict[str, str]]:
    """Return everything that the times depend on, except the machine and the versions: a change makes them invalid."""
    return {name: Case(problem, name, 1, 0).fingerprint for name in NAMES}


def step_seconds(problem: str, data: Path) -> dict[str, dict[str, float]]:
    """Return each optimizer's median seconds of a step that refreshes the curvature, and of one that does not."""
    task = PROBLEMS[problem].task(data)
    batches = task.batches(0)
    running = {name: start(Case(problem, name, 1, 0), task) for name in NAMES}
    running[OURS][1].refresh_every = STEPS  # type: ignore[attr-defined]
    seconds: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for turn in range(TURNS + 1):  # the first turn warms up
        drawn = [next(batches) for _ in range(STEPS)]
        for name, (model, optimizer) in running.items():
            times = []
            for batch in drawn:
                began = time.perf_counter()
                step(model, optimizer, task, batch)
                times.append(time.perf_counter() - began)
            if turn:
                seconds[name].append(times)
    for _, optimizer in running.values():
        close(optimizer)
    return {name: _medians(times, name == OURS) for name, times in seconds.items()}


def _medians(turns: list[list[float]], refreshes: bool) -> dict[str, float]:
    others = statistics.median(t for times in turns for t in times[refreshes:])
    first = statistics.median(times[0] for times in turns) if refreshes else others
    return {"refresh": first, "reuse": others}
