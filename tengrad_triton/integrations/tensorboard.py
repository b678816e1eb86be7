"""The stats of an optimizer in TensorBoard, from a loop of one's own."""

from __future__ import annotations

from typing import Any

from tengrad_triton.integrations.numbers import numbers_of, stats_of


def log_stats(writer: Any, optimizer: Any, *, each: bool = False) -> None:
    """Write the numbers of the last step, at the number of steps taken so far.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or any object with its ``add_scalar``.
        optimizer: `TENGraD`, or what Accelerate has wrapped it in.
        each: whether every block has its own curves: see `numbers_of`.

    Raises:
        TypeError: the optimizer has no stats.
    """
    steps = stats_of(optimizer).steps
    for name, number in numbers_of(optimizer, each=each).items():
        writer.add_scalar(name, number, steps)
