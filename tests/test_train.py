"""The training loop: what optimizers share, what an epoch reports, and going on from a checkpoint bit for bit."""

import dataclasses
import io
import math
from typing import get_args

import pytest
import torch
from rich.console import Console

from tengrad_triton.recipes import train
from tengrad_triton.recipes.data import load
from tengrad_triton.recipes.optimizers import AdamwSettings, OptimizerName, SgdSettings, TengradSettings
from tengrad_triton.recipes.settings import Settings
from tengrad_triton.recipes.train import Job, diverged, fit, rows_of, warm_up

NAMES = get_args(OptimizerName)
IMAGES = 150  # two steps of 64 and one of 22 an epoch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(train_limit=IMAGES, test_limit=50, **settings):
    given = {"width": 4, "epochs": 3, "batch_size": 64, "tengrad": TengradSettings(refresh_every=4)} | settings
    data = load("digits", None, train_limit, test_limit, Console(quiet=True))
    return Job(Settings(**given), data, torch.device("cpu"))


def ignore(epoch, totals_3):
    pass


def states(job, name, state=None, watch=ignore):
    """Return each epoch's state as a checkpoint would keep it: the tensors of a live one move on."""
    return [_through_a_file(state) for state in fit(job, name, state, watch)]


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left, right, where="state"):
    """Compare nested states bit for bit, but for the seconds in the rows."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        keys = [key for key in left if not str(key).endswith("_seconds")]
        assert keys == [key for key in right if not str(key).endswith("_seconds")], where
        for key in keys:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def test_every_optimizer_has_settings():
    assert [type(Settings().of(name)) for name in NAMES] == [TengradSettings, SgdSettings, AdamwSettings]


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_the_optimizer(name):
    settings = dataclasses.replace(Settings().of(name), lr=0.25, weight_decay=0.125)
    _, optimizer = job(**{name: settings}).build(name)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)


def test_all_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    def record(model, optimizer, images, labels):
        weights = [p.detach().clone() for p in model.parameters()]
        seen.setdefault(name, []).append((weights, images, labels))
        return step(model, optimizer, images, labels)

    step = train._step
    monkeypatch.setattr(train, "_step", record)
    for name in NAMES:
        states(job(epochs=2), name)
    reference = seen.pop("sgd")
    assert len(reference) == 6
    assert not torch.equal(reference[0][2], reference[3][2])  # the second epoch has its own order
    for steps in seen.values():
        assert_same(steps[0][0], reference[0][0], "first weights")
        assert_same([batch for _, *batch in steps], [batch for _, *batch in reference], "batches")


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_the_digits(name):
    rows = rows_of(states(job(train_limit=500, test_limit=None, width=16, epochs=12, batch_size=32), name)[-1])
    assert rows[-1].train_loss < 0.2 * rows[0].train_loss
    assert rows[-1].test_accuracy > 0.8


def test_a_row_tells_the_means_over_all_images():
    sums = []
    trained = job(epochs=1)
    state = states(trained, "sgd", watch=lambda epoch, totals_3: sums.append((epoch, totals_3.tolist())))[-1]
    (row,) = rows_of(state)
    assert [(epoch, seen) for epoch, (_, _, seen) in sums] == [(1, 64), (1, 128), (1, IMAGES)]
    loss, hits, _ = sums[-1][1]
    assert (row.train_loss, row.train_accuracy) == (loss / IMAGES, hits / IMAGES)
    assert min(row.train_seconds, row.eval_seconds) > 0

    model, _ = trained.build("sgd")
    model.load_state_dict(state["model"])
    test = trained.data.test
    output = model(trained.data.normalize(test.images))
    assert row.test_loss == pytest.approx(torch.nn.functional.cross_entropy(output, test.labels).item(), rel=1e-5)
    assert row.test_accuracy == (output.argmax(1) == test.labels).double().mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_bit_for_bit(name):
    """With TENGraD's curvature 2 steps old of 4 at the checkpoint."""
    straight = states(job(epochs=3), name)[-1]
    checkpoint = states(job(epochs=2), name)[-1]
    (resumed,) = states(job(epochs=3), name, checkpoint)
    assert_same(resumed, straight)
    assert len(resumed["rows"]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_neither_a_warm_up_nor_the_test_set_changes_the_training(name):
    plain = states(job(epochs=2), name)[-1]
    warm = warm_up(job(), name)
    assert warm.seconds > 0
    other = states(job(epochs=2, test_limit=10), name)[-1]
    assert_same(other["model"], plain["model"])
    assert_same(other["optimizer"], plain["optimizer"])


def test_only_tengrad_has_a_summary():
    summaries = {name: warm_up(job(), name).summary for name in NAMES}
    assert "0.weight" in summaries.pop("tengrad")
    assert set(summaries.values()) == {None}


def test_the_seed_changes_weights_and_order():
    assert job().build("sgd")[0][0].weight.ne(job(seed=1).build("sgd")[0][0].weight).all()
    first, second = (states(job(epochs=1, seed=seed), "sgd")[-1]["rows"][0]["train_loss"] for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("refresh_every", [1, 100])
@pytest.mark.parametrize("name", NAMES)
def test_training_ends_when_the_loss_is_not_finite(name, refresh_every):
    settings = dataclasses.replace(Settings().of(name), lr=1e30)
    if name == "tengrad":
        settings = dataclasses.replace(settings, refresh_every=refresh_every)
    rows = rows_of(states(job(**{name: settings}), name)[-1])
    assert len(rows) == 1
    assert not math.isfinite(rows[0].train_loss)
    assert diverged(rows)


def test_an_error_that_is_not_divergence_is_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(train, "_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        states(job(), "sgd")
