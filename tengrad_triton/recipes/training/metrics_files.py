"""Metrics as the text of files: metrics.csv, metrics.json and steps.csv."""

import csv
import io
import json
import math
from dataclasses import asdict, astuple, fields
from itertools import groupby
from typing import Any

import torch

from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import EpochMetrics, History, Steps


def epochs_csv(history: History) -> str:
    """Return a line for each optimizer and epoch."""
    lines = [astuple(epoch) for record in history.values() for epoch in record.epochs]
    return _csv([column.name for column in fields(EpochMetrics)], lines)


def epochs_json(history: History) -> list[dict[str, Any]]:
    """Return the epochs as JSON values: a number that is not finite becomes null."""
    epochs = [asdict(epoch) for record in history.values() for epoch in record.epochs]
    return [{key: _finite_or_none(value) for key, value in epoch.items()} for epoch in epochs]


def steps_csv(history: History) -> str:
    """Return a line for each optimizer and step. Steps count from 0, as the refreshes of TENGraD do."""
    lines = [
        (name, step, *values)
        for name, record in history.items()
        for step, values in enumerate(torch.stack(record.steps.columns, 1).tolist())
    ]
    return _csv(["optimizer", "step", *(column.name for column in fields(Steps))], lines)


def parse_epochs(text: str) -> dict[OptimizerName, list[EpochMetrics]]:
    """Return the epochs in the text of metrics.json; raises `ValueError` if it is anything else."""
    epochs: dict[OptimizerName, list[EpochMetrics]] = {}
    try:
        for entry in json.loads(text):
            name, epoch, *values = (entry.pop(column.name) for column in fields(EpochMetrics))
            numbers = (math.nan if value is None else float(value) for value in values)
            known = _known(name)
            epochs.setdefault(known, []).append(EpochMetrics(known, int(epoch), *numbers))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"got {error}, expected one object for each optimizer and epoch") from error
    return epochs


def parse_steps(text: str) -> dict[OptimizerName, Steps]:
    """Return the steps in the text of steps.csv; raises `ValueError` if it is anything else."""
    if text and not text.endswith("\n"):
        raise ValueError("its last line is cut off")
    header, *lines = (line.split(",") for line in text.splitlines() or [""])
    if header != (expected := ["optimizer", "step", *(column.name for column in fields(Steps))]):
        raise ValueError(f"got columns {', '.join(header)}, expected {', '.join(expected)}")
    steps: dict[OptimizerName, Steps] = {}
    for name, group in groupby(lines, key=lambda line: line[0]):
        table = torch.tensor([[float(number) for number in line[1:]] for line in group], dtype=torch.float64)
        count, *columns = table.unbind(1)
        if len(columns) != len(fields(Steps)) or not torch.equal(count, torch.arange(len(table)).double()):
            raise ValueError(f"got other steps of {name} than 0 to {len(table) - 1}, in their order")
        steps[_known(name)] = Steps(*columns)
    return steps


def _known(name: str) -> OptimizerName:
    if name not in OPTIMIZERS:
        raise ValueError(f"got optimizer {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    return name


def _csv(header: list[str], lines: list[tuple[Any, ...]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
