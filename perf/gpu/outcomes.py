"""What the results of the calls come to: the race's times, and the greatest error of a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from perf.results import Device

LIMITS = (88.0, 89.0, 90.0, 91.0, 92.0)
"""Test accuracies in percent, the times to which are compared."""


def by_optimizer(device: Device) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of the race by optimizer, in the order of the seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for case in device.cases("race"):
        runs.setdefault(case["optimizer"], []).append(case)
    return runs


def best_accuracy(case: dict[str, Any]) -> float:
    """Return the highest test accuracy of a run, in percent."""
    return max(point["accuracy"] for point in case["curve"])


def lowest_after_best(case: dict[str, Any]) -> float:
    """Return the lowest test accuracy of a run from its highest one on, in percent."""
    accuracies = [point["accuracy"] for point in case["curve"]]
    return min(accuracies[accuracies.index(max(accuracies)) :])


def time_to(accuracy: float, case: dict[str, Any]) -> float | None:
    """Return the seconds of training until the test accuracy was first as high; None if it never was."""
    return next((point["seconds"] for point in case["curve"] if point["accuracy"] >= accuracy), None)


def times_to_sgds_best(device: Device, optimizer: str) -> Iterator[tuple[float, float | None]]:
    """Yield, for each seed of both, the seconds of SGD and of the optimizer until SGD's highest accuracy."""
    runs = by_optimizer(device)
    theirs = {case["seed"]: case for case in runs.get("SGD", [])}
    for case in runs.get(optimizer, []):
        if (sgd := theirs.get(case["seed"])) is not None:
            top = max(sgd["curve"], key=lambda point: point["accuracy"])  # the first of equal ones
            yield top["seconds"], time_to(top["accuracy"], case)


def error_of_defaults(device: Device) -> float | None:
    """Return the greatest error over torch's of the default configurations; infinite if one failed, None without."""
    defaults = [case["implementations"]["default"] for case in device.cases("variants")]
    errors = [found.get("error_over_torch", math.inf) for found in defaults]
    return max((math.inf if math.isnan(error) else error for error in errors), default=None)
