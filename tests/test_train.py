"""The training loop: what optimizers share, what an epoch reports, going on bit for bit, and the folder of a run."""

import csv
import dataclasses
import io
import json
import math
import re
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode

from tengrad_triton.recipes.data.registry import load
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.baselines import (
    BASELINES,
    EkfacSettings,
    KbfgslSettings,
    KbfgsSettings,
    KfacSettings,
    ShampooSettings,
)
from tengrad_triton.recipes.optimizers.muon import MuonSettings
from tengrad_triton.recipes.optimizers.settings import AdamwSettings, SgdSettings, TengradSettings
from tengrad_triton.recipes.reports.run_figures import FIGURES
from tengrad_triton.recipes.training import loop as train
from tengrad_triton.recipes.training.loop import Job, diverged, fit, record_of, warm_up
from tengrad_triton.recipes.training.metrics import Record, Row, Steps, parsed_steps
from tengrad_triton.recipes.training.run import start
from tengrad_triton.recipes.training.run_folder import RunFolder, replacing
from tengrad_triton.recipes.training.settings import Settings, installed

NAMES = installed()
DEFAULTS = Settings().optimizer
IMAGES = 150  # two steps of 64 and one of 22 an epoch


@pytest.fixture(autouse=True, scope="module")
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


def test_all_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    seen = {}

    def record(model, optimizer, images, labels, closure):
        weights = [p.detach().clone() for p in model.parameters()]
        seen.setdefault(name, []).append((weights, images, labels))
        return step(model, optimizer, images, labels, closure)

    step = train.one_step
    monkeypatch.setattr(train, "one_step", record)
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
    steady = TengradSettings(damping=0.3, refresh_every=4)  # at 0.1 rounding decides whether 76 or 83 % are reached
    quick = {"tengrad": steady, "muon": MuonSettings(lr=0.01), "kfac": KfacSettings(lr=0.01, refresh_every=4)}
    quick |= {"ekfac": EkfacSettings(lr=0.01, damping=0.3, refresh_every=4, rescale_every=2)}
    quick |= {"kbfgs": KbfgsSettings(lr=0.03, damping=0.3, refresh_every=4)}
    quick |= {"shampoo": ShampooSettings(lr=0.3)}
    quick |= {"kbfgsl": KbfgslSettings(lr=0.03, damping=0.3, refresh_every=4)}
    trained = job(train_limit=500, test_limit=None, width=16, epochs=12, batch_size=32, **quick)
    rows = record_of(states(trained, name)[-1]).rows
    best = min(rows, key=lambda row: row.train_loss)  # the last but for tengrad_defaults, whose loss goes up and down
    assert best.train_loss < 0.2 * rows[0].train_loss
    assert best.test_accuracy > 0.7


def test_a_row_tells_the_means_over_all_images():
    sums = []
    trained = job(epochs=1)
    state = states(trained, "sgd", watch=lambda epoch, totals_3: sums.append((epoch, totals_3.tolist())))[-1]
    (row,) = record_of(state).rows
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


def test_steps_tell_each_batchs_means_and_the_time_so_far():
    sums = [torch.zeros(3, dtype=torch.float64)]
    record = record_of(states(job(epochs=2), "sgd", watch=lambda _, totals_3: sums.append(totals_3.clone()))[-1])
    totals_S3 = torch.stack([after - before * (after[2] > before[2]) for before, after in pairwise(sums)])
    assert totals_S3[:, 2].tolist() == [64, 64, 22] * 2
    torch.testing.assert_close(record.steps.loss, totals_S3[:, 0] / totals_S3[:, 2])
    torch.testing.assert_close(record.steps.accuracy, totals_S3[:, 1] / totals_S3[:, 2])
    first, second = (row.train_seconds for row in record.rows)
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
        next(fit(job(), "sgd", None, lambda *_: seen.append("step")))
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
        listed = summary is not None and "0.weight" in summary
        assert listed == (name.startswith("tengrad") or Settings().of(name).needs == BASELINES)


def test_the_seed_changes_weights_and_order():
    assert job().build("sgd")[0][0].weight.ne(job(seed=1).build("sgd")[0][0].weight).all()
    first, second = (states(job(epochs=1, seed=seed), "sgd")[-1]["rows"][0]["train_loss"] for seed in (0, 1))
    assert first != second


def test_a_loss_above_the_first_one_all_through_an_epoch_is_divergence():
    rows = [Row("sgd", epoch, 3.0, 0.1, 3.0, 0.1, 1.0, 1.0) for epoch in (1, 2)]
    cases = {(2.3, 4.0, 2.6, 2.6): True, (2.3, 4.0, 2.6, 2.2): False, (2.3, 2.2, 2.31, 2.32): False}
    for losses, expected in cases.items():
        steps = Steps(torch.arange(4.0), torch.tensor(losses), torch.zeros(4))
        assert diverged(Record(rows, steps)) == expected
        assert not diverged(Record(rows[:1], Steps(*(column[:2] for column in steps.columns))))
    assert not diverged(Record())


@pytest.mark.parametrize("interrupted", [False, True])
def test_rates_decay_after_the_epochs_that_are_named(interrupted, monkeypatch):
    rates = []

    def record(model, optimizer, *more):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, optimizer, *more)

    step = train.one_step
    monkeypatch.setattr(train, "one_step", record)
    decaying = {"decay_at": (1, 3), "decay": 0.5, "muon": MuonSettings(lr=2**-12)}
    state = states(job(epochs=2, **decaying), "muon")[-1] if interrupted else None
    states(job(epochs=4, **decaying), "muon", state)
    assert [by_group[0] for by_group in rates] == [2**-12] * 3 + [2**-13] * 6 + [2**-14] * 3
    assert all(len(set(by_group)) == 1 for by_group in rates)


@pytest.mark.parametrize("refresh_every", [1, 100])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "tengrad_defaults"])  # its steps are bounded
def test_training_ends_when_the_loss_is_not_finite(name, refresh_every):
    settings = dataclasses.replace(Settings().of(name), lr=1e30)
    if name == "tengrad":
        settings = dataclasses.replace(settings, refresh_every=refresh_every)
    record = record_of(states(job(**{name: settings}), name)[-1])
    assert (len(record.rows), len(record.steps)) == (1, 3)
    assert not math.isfinite(record.rows[0].train_loss)
    assert diverged(record)


def test_an_error_that_is_not_divergence_is_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(train, "cross_entropy", fail)
    with pytest.raises(RuntimeError, match="something else"):
        states(job(), "sgd")


# -- the folder of a run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train every optimizer for two epochs, once for the tests that look at the folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    limits = {"train_limit": IMAGES, "test_limit": 50, "width": 4, "epochs": 2, "batch_size": 64}
    start(Settings(device="cpu", sgd=SgdSettings(lr=0.05), **limits), folder, Console(quiet=True))
    return folder


def test_a_run_leaves_whole_files_only(run):
    files = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    events = {file for file in files if file.startswith("tensorboard/")}
    named = {"settings.json", "machine.json", "metrics.csv", "metrics.json", "steps.csv", "tengrad-summary.txt"}
    checkpoints = {f"checkpoints/{name}.pt" for name in DEFAULTS}
    assert files - events == named | {f"{name}.png" for name in FIGURES} | checkpoints
    assert {file.split("/")[1] for file in events} == set(DEFAULTS)


def test_settings_are_what_was_asked_for(run):
    settings = json.loads((run / "settings.json").read_text())
    assert settings["sgd"] == dataclasses.asdict(SgdSettings(lr=0.05))
    assert settings["adamw"]["betas"] == list(AdamwSettings().betas)
    assert (settings["optimizer"], settings["epochs"], settings["train_limit"]) == (list(DEFAULTS), 2, IMAGES)
    assert "data" not in settings


def test_csv_and_json_hold_a_row_an_optimizer_and_epoch(run):
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [Row(**row) for row in json.loads((run / "metrics.json").read_text())]
    assert [(row.optimizer, row.epoch) for row in rows] == [(name, epoch) for name in DEFAULTS for epoch in (1, 2)]
    assert [{key: str(value) for key, value in vars(row).items()} for row in rows] == table
    assert all(0 <= row.test_accuracy <= 1 and row.train_loss > 0 and row.train_seconds > 0 for row in rows)


def test_machine_and_versions_are_known(run):
    (session,) = json.loads((run / "machine.json").read_text())
    assert session["torch"] == torch.__version__
    assert session["tengrad-triton"] == version("tengrad-triton")
    assert session["threads"] == torch.get_num_threads()
    assert session["device"]
    assert set(session["warm_up_seconds"]) == set(DEFAULTS)
    assert session["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", session["commit"])


@pytest.mark.parametrize("name", DEFAULTS)
def test_tensorboard_csv_and_checkpoint_have_the_same_numbers(run, name):
    events = EventAccumulator(str(run / "tensorboard" / name))
    events.Reload()
    rows = [row for row in json.loads((run / "metrics.json").read_text()) if row["optimizer"] == name]
    for tag, key in (("train/loss", "train_loss"), ("test/accuracy", "test_accuracy")):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2]
        np.testing.assert_allclose([scalar.value for scalar in scalars], [row[key] for row in rows], rtol=1e-6)
    steps = vars(parsed_steps((run / "steps.csv").read_text())[name])
    saved = torch.load(run / f"checkpoints/{name}.pt", weights_only=True)["steps"]
    for key, column_S in steps.items():
        assert torch.equal(column_S, saved[key])
        scalars = events.Scalars(f"step/{key}")
        assert [scalar.step for scalar in scalars] == list(range(6))
        np.testing.assert_allclose([scalar.value for scalar in scalars], column_S, rtol=1e-6)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail():
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run", Settings())
    folder.save_checkpoint("sgd", {"model": {}})
    with pytest.raises(UsageError, match=r"sgd\.pt: no rows and steps"):
        folder.load_checkpoint("sgd")
