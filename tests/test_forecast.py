"""What a refresh with many rows takes is said before it is made, once, and what does not fit is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.tuning import forecast
from tengrad_triton.tuning.forecast import Forecaster, memory_of

N, CLASSES = 16, 3
GIB = 2**30


@pytest.fixture
def rates(monkeypatch):
    """A device that factors a matrix of 100 rows in a second, and computes a million flops a second."""
    monkeypatch.setattr(Forecaster, "_factoring", (100, 1.0))
    monkeypatch.setattr(Forecaster, "_flops_per_second", 1e6)
    monkeypatch.setattr(forecast, "_WORTH_MEASURING", 0)


@pytest.fixture
def foreseen(monkeypatch):
    """Every forecast that optimizers ask for."""
    kept, report = [], Forecaster.report

    def remember(self, rows):
        kept.append((self, rows))
        return report(self, rows)

    monkeypatch.setattr(Forecaster, "report", remember)
    return kept


def model_of(double=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return model.double() if double else model


def take_step(model, optimizer, samples=N):
    optimizer.zero_grad()
    x = torch.randn(samples, 6, dtype=next(model.parameters()).dtype)
    F.cross_entropy(model(x), torch.randint(CLASSES, (samples,))).backward()
    optimizer.step()


ROWS = N * CLASSES
SIZES = {
    "a row for each sample": ({}, [N, N], 4),
    "exact": ({"fisher": "exact"}, [ROWS, ROWS], 4),
    "exact, fewer rows": ({"fisher": "exact", "fisher_rows": 20}, [20, 20], 4),
    "several draws": ({"fisher_samples": 2}, [2 * N, 2 * N], 4),
    "history": ({"history": 3}, [3 * N, 3 * N], 4),
    "one block": ({"fisher": "exact", "blocks": "network"}, [ROWS], 4),
    "explicit rows, fewer parameters than rows": (
        {"fisher": "exact", "representation": "per_sample"}, [ROWS, 9 * CLASSES], 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_the_sizes_of_k_are_those_of_the_curvature(case, double, foreseen):
    options, sides, itemsize = SIZES[case]
    model = model_of(double)
    optimizer = TENGraD(model, refresh_every=1, seed=0, **options)
    for _ in range(options.get("history", 1)):
        take_step(model, optimizer)
    [(forecaster, rows)] = foreseen  # not again for as many rows
    found = [inverse.shape[-1] for one in optimizer._curvature.inverses for inverse in one.inverse_BNN]
    assert sorted(forecaster._sides_of_k(rows)[0]) == sorted(sides) == sorted(found)
    assert forecaster._bytes(rows) == 3 * itemsize * (1 + double) * sum(n * n for n in sides)


def test_more_rows_take_longer_and_are_foreseen_again(rates, foreseen, monkeypatch):
    monkeypatch.setattr(forecast, "_MOST_SECONDS", float("inf"))
    model = model_of()
    optimizer = TENGraD(model, fisher="exact", refresh_every=1)
    take_step(model, optimizer)
    [(forecaster, rows)] = foreseen
    few, many = forecaster.at(rows // 2), forecaster.at(rows)
    assert few.seconds < many.seconds
    assert few.by_rows < many.by_rows <= many.seconds
    assert many.rows == ROWS
    assert many.by_rows >= 2 * (ROWS / 100) ** 3  # two factorizations
    take_step(model, optimizer, samples=2 * N)
    assert [rows for _, rows in foreseen] == [ROWS, 2 * ROWS]


def test_a_user_is_told_once_before_the_first_refresh(rates, monkeypatch):
    monkeypatch.setattr(forecast, "_MOST_SECONDS", 0.01)
    model = model_of()
    optimizer = TENGraD(model, fisher="exact", refresh_every=1)
    message = (
        r"J has 48 rows: each refresh will take about 0\.49 s on this device \(0\.39 s because of so many rows\) and "
        r".* GiB for K and its factors; fisher_rows= keeps fewer rows \(up to about 16 add less than a second\)"
    )
    with pytest.warns(UserWarning, match=message) as said:
        take_step(model, optimizer)
    assert [one.filename for one in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(model, optimizer)


def test_what_is_measured_gives_seconds():
    work = type("NoWork", (), {"weights": {}, "history": 1})()
    forecaster = Forecaster(work, [], lambda rows: ({}, {}), TENGraD(model_of())._ops, torch.device("cpu"))
    size, seconds = forecaster._factoring
    assert size in (1024, 2048, 4096)
    assert 0 < seconds < 60
    assert 1e7 < forecaster._flops_per_second < 1e15


def test_ordinary_steps_measure_nothing(monkeypatch):
    monkeypatch.setattr(Forecaster, "_measured", None)  # calling it would fail
    model = model_of()
    for options in ({}, {"fisher": "exact"}, {"blocks": "network", "fisher_samples": 4}):
        take_step(model, TENGraD(model, **options), samples=128)


def test_k_beyond_the_memory_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(forecast, "_WORTH_MEASURING", 0)
    monkeypatch.setattr(forecast, "_MOST_SECONDS", float("inf"))
    monkeypatch.setattr(forecast, "memory_of", lambda device: 12 * 2 * 40**2)
    model = model_of()
    optimizer = TENGraD(model, fisher="exact")
    before = [p.detach().clone() for p in model.parameters()]
    message = (
        r"J would have 48 rows: K of 2 blocks, its factors and their inverses would take .* GiB, but there are .* GiB; "
        r"set fisher_rows= to keep fewer rows \(at most 40 fit\)"
    )
    with pytest.raises(ValueError, match=message):
        take_step(model, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not optimizer.summary().parameters[0].bytes
    fitting = TENGraD(model, fisher="exact", fisher_rows=40)
    take_step(model, fitting)
    assert fitting.block("0").rows == 40


def test_the_memory_of_this_machine_is_known():
    assert memory_of(torch.device("cpu")) > GIB / 8
