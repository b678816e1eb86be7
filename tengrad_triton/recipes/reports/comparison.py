"""The optimizers of a run side by side, as cells of tables: the terminal's and the report's."""

from statistics import median

import torch
from torch import Tensor

from tengrad_triton.recipes.training.metrics import History

OUTCOME = ("optimizer", "test acc.", "best (epoch)", "train loss", "time", "an epoch", "× SGD")
STEP_TIME = ("steps", "number", "median", "× SGD")


def outcomes(history: History) -> list[tuple[str, ...]]:
    """Return a row an optimizer; an epoch's time is the median, because other programs disturb single ones."""
    table: list[tuple[str, ...]] = []
    epoch_seconds = {
        name: median(row.train_seconds for row in record.rows) for name, record in history.items() if record.rows
    }
    for name, seconds in epoch_seconds.items():
        rows = history[name].rows
        best = max(rows, key=lambda row: row.test_accuracy)
        table.append(
            (
                name,
                f"{rows[-1].test_accuracy:.2%}",
                f"{best.test_accuracy:.2%} ({best.epoch})",
                f"{rows[-1].train_loss:.4f}",
                f"{history[name].train_seconds:.1f} s",
                f"{seconds:.2f} s",
                f"{seconds / epoch_seconds['sgd']:.2f}" if "sgd" in epoch_seconds else "-",
            )
        )
    return table


def step_times(history: History, refresh_every: int) -> list[tuple[str, ...]]:
    """Return a row an optimizer, and for TENGraD's steps that refresh the curvature and those that reuse it.

    Meaningful on a CPU only: the host's times do not wait for a GPU.
    """
    durations: dict[str, Tensor] = {}
    for name, record in history.items():
        durations[name] = record.steps.durations()
        if name == "tengrad":
            refresh_S = (torch.arange(len(record.steps)) % refresh_every) == 0
            durations["tengrad, refresh"] = durations[name][refresh_S]
            durations["tengrad, reuse"] = durations[name][~refresh_S]
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
