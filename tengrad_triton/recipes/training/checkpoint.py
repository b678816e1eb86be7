"""What `torch.save` keeps after each epoch of an optimizer, and how training resumes from it."""

from dataclasses import asdict, astuple
from typing import Any

import torch
from torch import nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record, Steps

State = dict[str, Any]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, record: Record, device: torch.device) -> State:
    """Return the model, the optimizer, the random number generators and the record."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "rows": [asdict(epoch) for epoch in record.epochs],
        "steps": dict(vars(record.steps)),
    }


def record_of(state: State | None) -> Record:
    """Return the epochs and steps in a state; none without a state. Raises `UsageError` if it holds something else."""
    if state is None:
        return Record()
    try:
        epochs, steps = [EpochMetrics(**epoch) for epoch in state["rows"]], Steps(**state["steps"])
        numbers = [number for epoch in epochs for number in astuple(epoch)[1:]]
        if not all(isinstance(number, int | float) for number in numbers) or not isinstance(epochs[0].epoch, int):
            raise TypeError(f"got epochs {numbers}")
        if len({column.shape for column in steps.columns}) != 1:
            raise TypeError("its columns of steps differ in length")
    except (TypeError, IndexError, AttributeError) as error:
        raise UsageError(f"a checkpoint holds no epochs ({error}): delete it to train from the start") from error
    return Record(epochs, steps)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State, device: torch.device) -> Record:
    """Load a state into the model, the optimizer and the random number generators, and return its record.

    Raises `UsageError` if the state is that of another model or optimizer.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"a checkpoint does not fit the run's settings ({error}): restore settings.json") from error
    return record_of(state)
