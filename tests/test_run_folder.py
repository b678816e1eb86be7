"""The folder of a run: its files are whole, hold the same numbers, and something else is refused."""

import csv
import dataclasses
import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from helpers.training import IMAGES
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tengrad_triton.files import replacing
from tengrad_triton.recipes.cli.train import start
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.first_order import AdamwSettings, SgdSettings
from tengrad_triton.recipes.reports.run_figures import FIGURES
from tengrad_triton.recipes.training.metrics import EpochMetrics
from tengrad_triton.recipes.training.metrics_files import parse_steps
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

DEFAULTS = Settings().optimizer


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
    named = {"settings.json", "machine.json", "metrics.csv", "metrics.json", "steps.csv"}
    named |= {f"{name}-summary.txt" for name in DEFAULTS if name.startswith("tengrad")}
    checkpoints = {f"checkpoints/{name}.pt" for name in DEFAULTS}
    named |= {".tengrad-triton-run.lock"}
    assert files - events == named | {f"{name}.png" for name in FIGURES} | checkpoints
    assert {file.split("/")[1] for file in events} == set(DEFAULTS)


def test_settings_are_what_was_asked_for(run):
    settings = json.loads((run / "settings.json").read_text())
    assert settings["sgd"] == dataclasses.asdict(SgdSettings(lr=0.05))
    assert settings["adamw"]["betas"] == list(AdamwSettings().betas)
    assert (settings["optimizer"], settings["epochs"], settings["train_limit"]) == (list(DEFAULTS), 2, IMAGES)
    assert "data" not in settings


def test_csv_and_json_hold_a_line_for_each_optimizer_and_epoch(run):
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    epochs = [EpochMetrics(**epoch) for epoch in json.loads((run / "metrics.json").read_text())]
    assert [(epoch.optimizer, epoch.epoch) for epoch in epochs] == [(name, n) for name in DEFAULTS for n in (1, 2)]
    assert [{key: str(value) for key, value in vars(epoch).items()} for epoch in epochs] == table
    assert all(0 <= epoch.test_accuracy <= 1 and epoch.train_loss > 0 and epoch.train_seconds > 0 for epoch in epochs)


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
    steps = vars(parse_steps((run / "steps.csv").read_text())[name])
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
    with pytest.raises(UsageError, match=r"sgd\.pt: expected the keys rows and steps"):
        folder.load_checkpoint("sgd")
