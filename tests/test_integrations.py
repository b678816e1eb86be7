"""The stats of an optimizer as flat numbers: they need no package of a trainer."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from situation_models import batches, mlp

from tengrad_triton import TENGraD
from tengrad_triton.integrations.numbers import has_stats, numbers_of
from tengrad_triton.integrations.tensorboard import log_stats


@dataclasses.dataclass
class Inner:
    share: float
    name: str


@dataclasses.dataclass
class SomeStats:
    steps: int
    damping: dict
    change: float | None
    inner: Inner


class Holding:
    def __init__(self, stats):
        self.stats = stats


class Wrapping:
    """As Accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


STATS = SomeStats(3, {"0": 2.0, "": 0.5}, None, Inner(0.25, "text"))
FLAT = {"tengrad/steps": 3.0, "tengrad/inner/share": 0.25}


@pytest.mark.parametrize(
    ("each", "more"),
    [
        (False, {"tengrad/damping/min": 0.5, "tengrad/damping/max": 2.0}),
        (True, {"tengrad/damping/0": 2.0, "tengrad/damping/": 0.5}),
    ],
)
def test_numbers_are_flat_and_what_is_no_number_is_left_out(each, more):
    assert numbers_of(Holding(STATS), each=each) == {**FLAT, **more}
    assert numbers_of(Wrapping(Wrapping(Holding(STATS))), each=each) == {**FLAT, **more}


class Writer:
    def __init__(self):
        self.written = {}

    def add_scalar(self, name, number, step):
        self.written.setdefault(step, {})[name] = number


def test_stats_of_an_optimizer_are_written_at_its_steps():
    torch.manual_seed(0)
    model, writer = mlp().double(), Writer()
    optimizer = TENGraD(model)
    log_stats(writer, optimizer)  # before the first step too
    for x, y in batches(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        log_stats(writer, optimizer)
    assert list(writer.written) == [0, 1, 2]
    assert writer.written[2]["tengrad/rows"] == 5
    dampings = optimizer.stats.damping.values()
    assert writer.written[2]["tengrad/damping/min"] == min(dampings)
    assert writer.written[2]["tengrad/damping/max"] == max(dampings)
    assert "tengrad/actual_change" not in writer.written[2]


def test_an_optimizer_without_stats_is_refused():
    optimizer = torch.optim.SGD(mlp().parameters())
    assert not has_stats(optimizer)
    with pytest.raises(TypeError, match="expected an optimizer with stats, such as TENGraD, got SGD"):
        numbers_of(optimizer)
