"""The optimizers of a run side by side, as lines of tables for the terminal and the page."""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import History

OUTCOME = ("optimizer", "test acc.", "best (epoch)", "train loss", "time", "an epoch", "× SGD")
STEP_TIME = ("steps", "number", "median", "× SGD")


def outcomes(history: History) -> list[tuple[str, ...]]:
    """Return a line for each optimizer. The time of an epoch is a median, which load on the machine changes least."""
    lines: list[tuple[str, ...]] = []
    epoch_seconds = {
        name: median(epoch.train_seconds for epoch in record.epochs)
        for name, record in history.items()
        if record.epochs
    }
    for name, seconds in epoch_seconds.items():
        epochs = history[name].epochs
        best = max(epochs, key=lambda epoch: epoch.test_accuracy)
        lines.append(
            (
                name,
                f"{epochs[-1].test_accuracy:.2%}",
                f"{best.test_accuracy:.2%} ({best.epoch})",
                f"{epochs[-1].train_loss:.4f}",
                f"{history[name].train_seconds:.1f} s",
                f"{seconds:.2f} s",
                f"{seconds / epoch_seconds['sgd']:.2f}" if "sgd" in epoch_seconds else "-",
            )
        )
    return lines


def step_times(history: History, refreshes: Mapping[OptimizerName, Sequence[int]]) -> list[tuple[str, ...]]:
    """Return a line for each optimizer, and for its refreshing and its reusing steps if it has both.

    The times mean something on a CPU only: those of the host do not include the work that a GPU still has to do.
    """
    durations: dict[str, Tensor] = {}
    for name, record in history.items():
        durations[name] = record.steps.durations()
        refresh_S = torch.zeros(len(record.steps), dtype=torch.bool)
        refresh_S[list(refreshes[name])] = True
        if refresh_S.any() and not refresh_S.all():
            durations[f"{name}, refresh"] = durations[name][refresh_S]
            durations[f"{name}, reuse"] = durations[name][~refresh_S]
    medians = {label: median(times_S.tolist()) for label, times_S in durations.items() if len(times_S)}
    return [
        (
            label,
            f"{len(durations[label])}",
            f"{1e3 * seconds:.2f} ms",
            f"{seconds / medians['sgd']:.2f}" if "sgd" in medians else "-",
        )
        for label, seconds in medians.items()
    ]
