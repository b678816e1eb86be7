"""The time of a step. The optimizers take a few steps each in turn, so that other load affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from studies.optimizers import NAMES, OURS, close
from studies.problems import PROBLEMS
from studies.runs import Case, start, step

PASSES = 3  # over all problems: the speed of a shared machine drifts within minutes
TURNS, STEPS = 8, 10  # a turn of TENGraD begins with a refresh; SOAP updates its basis once in a turn
Turns = dict[str, list[list[float]]]
"""The seconds of each step of each turn, by the optimizer."""
SLOW = 1e-3  # times a rival's default learning rate: a step costs the same at any, and so no model diverges


def settings(problem: str) -> dict[str, dict[str, str]]:
    """Return everything that the times depend on, except the machine and the versions: a change makes them invalid."""
    return {name: _case(problem, name).fingerprint for name in NAMES}


def turns(problem: str, data: Path) -> Turns:
    """Return the seconds of the steps of one pass."""
    task = PROBLEMS[problem].task(data)
    batches = task.batches(0)
    running = {name: start(_case(problem, name), task) for name in NAMES}
    running[OURS][1].refresh_every = STEPS  # type: ignore[attr-defined]
    seconds: Turns = {name: [] for name in NAMES}
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
    return seconds


def step_seconds(passes: Iterable[Turns]) -> dict[str, dict[str, float]]:
    """Return each optimizer's seconds of a step that refreshes the curvature, and of one that does not."""
    all_turns: Turns = {name: [] for name in NAMES}
    for one in passes:
        for name, times in one.items():
            all_turns[name] += times
    return {name: _medians(times, name == OURS) for name, times in all_turns.items()}


def _case(problem: str, name: str) -> Case:
    return Case(problem, name, 1 if name == OURS else SLOW, 0)


def _medians(turns: list[list[float]], refreshes: bool) -> dict[str, float]:
    """Return the seconds of a refresh and of any other step: each step of a turn by its median over the turns."""
    medians = [statistics.median(times) for times in zip(*turns, strict=True)]
    others = statistics.mean(medians[refreshes:])
    return {"refresh": medians[0] if refreshes else others, "reuse": others}
