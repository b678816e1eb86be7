"""What a run measures: a row for every epoch and a column entry for every step, and how files keep both.

Key: S steps.
"""

import csv
import io
import json
import math
from dataclasses import asdict, astuple, dataclass, field, fields
from itertools import groupby
from typing import Any, Self, get_args

import torch
from torch import Tensor

from tengrad_triton.recipes.optimizers.settings import OptimizerName


@dataclass(frozen=True)
class Row:
    """One epoch of one optimizer. Losses are means over images; the training ones are taken while the weights move."""

    optimizer: OptimizerName
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    eval_seconds: float
    cpu_seconds: float = 0.0  # the host's processors' in training: on one thread, what other programs do not disturb


@dataclass(frozen=True)
class Steps:
    """Every training step of one optimizer, from its first: columns in float64, on the CPU."""

    train_seconds: Tensor  # S: the host's time from the start of training to the step's end, without evaluations
    loss: Tensor  # S: the batch's mean, from before the step
    accuracy: Tensor  # S

    @classmethod
    def of(cls, train_seconds_S: Tensor, totals_S3: Tensor) -> Self:
        """Make means of each batch's [sum of the losses, right answers, images]."""
        loss_S, hits_S, images_S = totals_S3.unbind(1)
        return cls(train_seconds_S, loss_S / images_S, hits_S / images_S)

    def __len__(self) -> int:
        return len(self.loss)

    def __add__(self, later: Self) -> Self:
        return type(self)(*(torch.cat(pair) for pair in zip(self.columns, later.columns, strict=True)))

    @property
    def columns(self) -> list[Tensor]:
        """The columns in the order of the fields."""
        return [getattr(self, column.name) for column in fields(self)]

    def durations(self) -> Tensor:
        """Return each step's own seconds, from the end of the step before: [S]."""
        return self.train_seconds.diff(prepend=self.train_seconds.new_zeros(1))


@dataclass(frozen=True)
class Record:
    """One optimizer's epochs and steps; every epoch has as many steps as the others."""

    rows: list[Row] = field(default_factory=list)
    steps: Steps = field(default_factory=lambda: Steps(*torch.empty(3, 0, dtype=torch.float64)))

    def then(self, row: Row, steps: Steps) -> Self:
        """Return the record with one more epoch."""
        return type(self)([*self.rows, row], self.steps + steps)

    @property
    def train_seconds(self) -> float:
        """How long training took so far."""
        return sum(row.train_seconds for row in self.rows)


History = dict[OptimizerName, Record]


def rows_csv(history: History) -> str:
    """Return a line an optimizer and epoch."""
    lines = [astuple(row) for record in history.values() for row in record.rows]
    return _csv([column.name for column in fields(Row)], lines)


def rows_json(history: History) -> list[dict[str, Any]]:
    """Return the rows as JSON has them: a number that is not finite becomes null."""
    rows = [asdict(row) for record in history.values() for row in record.rows]
    return [{key: _or_null(value) for key, value in row.items()} for row in rows]


def steps_csv(history: History) -> str:
    """Return a line an optimizer and step; steps count from 0, as TENGraD's refreshes do."""
    lines = [
        (name, step, *values)
        for name, record in history.items()
        for step, values in enumerate(torch.stack(record.steps.columns, 1).tolist())
    ]
    return _csv(["optimizer", "step", *(column.name for column in fields(Steps))], lines)


def parsed_rows(text: str) -> dict[OptimizerName, list[Row]]:
    """Read `rows_json` as text; raises `ValueError` on anything else."""
    rows: dict[OptimizerName, list[Row]] = {}
    try:
        for row in json.loads(text):
            name, epoch, *numbers = (row.pop(column.name) for column in fields(Row))
            read = Row(_known(name), int(epoch), *(math.nan if number is None else float(number) for number in numbers))
            rows.setdefault(read.optimizer, []).append(read)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"got {error}, expected one object an optimizer and epoch") from error
    return rows


def parsed_steps(text: str) -> dict[OptimizerName, Steps]:
    """Read `steps_csv`; raises `ValueError` on anything else."""
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
    for known in get_args(OptimizerName):
        if name == known:
            return known
    raise ValueError(f"got optimizer {name!r}, expected one of {', '.join(get_args(OptimizerName))}")


def _csv(header: list[str], lines: list[tuple[Any, ...]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()


def _or_null(value: Any) -> Any:
    """JSON has no number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
