"""The training loop: what optimizers share, what an epoch measures, and resuming bit for bit."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from helpers.training import IMAGES, assert_same, job, states
from torch.overrides import TorchFunctionMode

from tengrad_triton.recipes.optimizers import baselines
from tengrad_triton.recipes.optimizers.baselines import EkfacSettings, KbfgslSettings, KbfgsSettings, KfacSettings
from tengrad_triton.recipes.optimizers.muon import MuonSettings
from tengrad_triton.recipes.optimizers.tengrad import TengradPaperSettings
from tengrad_triton.recipes.optimizers.third_party import ShampooSettings
from tengrad_triton.recipes.training import loop
from tengrad_triton.recipes.training.checkpoint import record_of
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record, Steps
from tengrad_triton.recipes.training.settings import Settings, installed
from tengrad_triton.recipes.training.warm_up import warm_up

NAMES = installed()
BOUNDED = ("tengrad", "tengrad_unscaled")


def test_all_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    def record(model, optimizer, images, labels, closure):
        weights = [p.detach().clone() for p in model.parameters()]
        seen.setdefault(name, []).append((weights, images, labels))
        return step(model, optimizer, images, labels, closure)

    step = loop.one_step
    monkeypatch.setattr(loop, "one_step", record)
    for name in NAMES:
        states(job(epochs=2), name)
    reference = seen.pop("sgd")
    assert len(reference) == 6
    assert not torch.equal(reference[0][2], reference[3][2])  # the second epoch has its own order
    for steps in seen.values():
        assert_same(steps[0][0], reference[0][0], "first weights")
        assert_same([batch for _, *batch in steps], [batch for _, *batch in reference], "batches")


@pytest.mark.parametrize(  # the roots of Shampoo's factors take twenty seconds
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "shampoo" else []) for name in NAMES]
)
def test_every_optimizer_learns_the_digits(name):
    steady = TengradPaperSettings(
        damping=0.3, refresh_every=4
    )  # at 0.1 rounding decides whether 76 or 83 % are reached
    quick = {"tengrad_paper": steady, "muon": MuonSettings(lr=0.01), "kfac": KfacSettings(lr=0.01, refresh_every=12)}
    quick |= {"ekfac": EkfacSettings(lr=0.01, damping=0.3, refresh_every=12, rescale_every=4)}
    quick |= {"kbfgs": KbfgsSettings(lr=0.03, damping=0.3, refresh_every=12)}
    quick |= {"shampoo": ShampooSettings(lr=0.3)}
    quick |= {"kbfgsl": KbfgslSettings(lr=0.03, damping=0.3, refresh_every=12)}
    trained = job(train_limit=500, test_limit=None, width=16, epochs=12, batch_size=32, **quick)
    epochs = record_of(states(trained, name)[-1]).epochs
    best = min(epochs, key=lambda epoch: epoch.train_loss)  # tengrad's loss is not monotonic
    assert best.train_loss < 0.2 * epochs[0].train_loss
    assert best.test_accuracy > 0.7


def test_an_epochs_metrics_are_means_over_all_images():
    sums = []
    trained = job(epochs=1)
    state = states(trained, "sgd", watch=lambda epoch, totals_3: sums.append((epoch, totals_3.tolist())))[-1]
    (metrics,) = record_of(state).epochs
    assert [(epoch, seen) for epoch, (_, _, seen) in sums] == [(1, 64), (1, 128), (1, IMAGES)]
    loss, hits, _ = sums[-1][1]
    assert (metrics.train_loss, metrics.train_accuracy) == (loss / IMAGES, hits / IMAGES)
    assert min(metrics.train_seconds, metrics.eval_seconds) > 0

    model, _ = trained.build("sgd")
    model.load_state_dict(state["model"])
    test = trained.data.test
    output = model(trained.data.normalize(test.images))
    assert metrics.test_loss == pytest.approx(torch.nn.functional.cross_entropy(output, test.labels).item(), rel=1e-5)
    assert metrics.test_accuracy == (output.argmax(1) == test.labels).double().mean().item()


def test_steps_tell_each_batchs_means_and_the_time_so_far():
    sums = [torch.zeros(3, dtype=torch.float64)]
    record = record_of(states(job(epochs=2), "sgd", watch=lambda _, totals_3: sums.append(totals_3.clone()))[-1])
    totals_S3 = torch.stack([after - before * (after[2] > before[2]) for before, after in pairwise(sums)])
    assert totals_S3[:, 2].tolist() == [64, 64, 22] * 2
    torch.testing.assert_close(record.steps.loss, totals_S3[:, 0] / totals_S3[:, 2])
    torch.testing.assert_close(record.steps.accuracy, totals_S3[:, 1] / totals_S3[:, 2])
    first, second = (epoch.train_seconds for epoch in record.epochs)
    durations_S, ends_S = record.steps.durations(), record.steps.train_seconds
    assert durations_S.min() > 0
    assert durations_S.sum().item() == pytest.approx(ends_S[-1].item())
    assert ends_S[2] < first < ends_S[3] < ends_S[5] < first + second


def test_nothing_is_read_from_the_device_before_an_epochs_last_step():
    """Each of these functions makes a GPU wait."""
    reads = {"tolist", "item", "cpu", "numpy", "to", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
    seen = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        next(loop.fit(job(), "sgd", None, lambda *_: seen.append("step")))
    first, last = seen.index("step"), len(seen) - seen[::-1].index("step")
    assert seen.count("step") == 3
    assert not reads & set(seen[first:last])
    assert reads & set(seen[last:])


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


def test_those_with_a_curvature_have_a_summary():
    summaries = {name: warm_up(job(), name).summary for name in NAMES}
    for name, summary in summaries.items():
        listed = summary is not None and "  weight  " in summary
        assert listed == (name.startswith("tengrad") or Settings().of(name).package == baselines.PACKAGE)


def test_the_seed_changes_weights_and_order():
    assert job().build("sgd")[0][0].weight.ne(job(seed=1).build("sgd")[0][0].weight).all()
    first, second = (states(job(epochs=1, seed=seed), "sgd")[-1]["rows"][0]["train_loss"] for seed in (0, 1))
    assert first != second


def test_a_loss_above_the_first_one_all_through_an_epoch_is_divergence():
    epochs = [EpochMetrics("sgd", epoch, 3.0, 0.1, 3.0, 0.1, 1.0, 1.0) for epoch in (1, 2)]
    cases = {(2.3, 4.0, 2.6, 2.6): True, (2.3, 4.0, 2.6, 2.2): False, (2.3, 2.2, 2.31, 2.32): False}
    for losses, expected in cases.items():
        steps = Steps(torch.arange(4.0), torch.tensor(losses), torch.zeros(4))
        assert Record(epochs, steps).diverged == expected
        assert not Record(epochs[:1], Steps(*(column[:2] for column in steps.columns))).diverged
    assert not Record().diverged


@pytest.mark.parametrize("interrupted", [False, True])
def test_rates_decay_after_the_epochs_that_are_named(interrupted, monkeypatch):
    rates = []

    def record(model, optimizer, *more):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, optimizer, *more)

    step = loop.one_step
    monkeypatch.setattr(loop, "one_step", record)
    decaying = {"decay_at": (1, 3), "decay": 0.5, "muon": MuonSettings(lr=2**-12)}
    state = states(job(epochs=2, **decaying), "muon")[-1] if interrupted else None
    states(job(epochs=4, **decaying), "muon", state)
    assert [by_group[0] for by_group in rates] == [2**-12] * 3 + [2**-13] * 6 + [2**-14] * 3
    assert all(len(set(by_group)) == 1 for by_group in rates)


@pytest.mark.parametrize("refresh_every", [1, 100])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in BOUNDED])
def test_training_ends_when_the_loss_is_not_finite(name, refresh_every):
    settings = dataclasses.replace(Settings().of(name), lr=1e30)
    if name == "tengrad_paper":
        settings = dataclasses.replace(settings, refresh_every=refresh_every)
    record = record_of(states(job(**{name: settings}), name)[-1])
    assert (len(record.epochs), len(record.steps)) == (1, 3)
    assert not math.isfinite(record.epochs[0].train_loss)
    assert record.diverged


def test_an_error_that_is_not_divergence_is_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "cross_entropy", fail)
    with pytest.raises(RuntimeError, match="something else"):
        states(job(), "sgd")
