"""An interrupted run goes on, a finished one is shown again, and a damaged or contradicted one is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import PROCESS, SMALL, a_quick_command, checkpoint, metrics, one_line, train_small
from helpers.training import assert_same

from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.training import loop
from tengrad_triton.recipes.training.settings import Settings

NAMES = Settings().optimizer


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with a_quick_command():
        yield


def interrupt_at(step, monkeypatch):
    """Have Ctrl-C come in the given step of training."""
    original, taken = loop.one_step, iter(range(10**6))

    def interrupted(*arguments):
        if next(taken) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "one_step", interrupted)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Train every optimizer for three epochs without an interruption."""
    with a_quick_command():
        folder = tmp_path_factory.mktemp("straight") / "run"
        assert train_small(folder, "--epochs", "3") == 0
    return folder


@pytest.mark.parametrize("interrupted", NAMES)
def test_an_interrupted_run_goes_on_bit_for_bit(interrupted, straight, tmp_path, monkeypatch, capsys):
    """Interrupted in the second step of the third epoch of one optimizer."""
    warm_up, epoch = 2 * len(NAMES), 3
    with monkeypatch.context() as patch:
        interrupt_at(warm_up + 3 * epoch * NAMES.index(interrupted) + 2 * epoch + 1, patch)
        assert train_small("halted", "--epochs", "3") == 130
    assert "--resume halted" in one_line(capsys)
    assert len([epoch for epoch in metrics(tmp_path / "halted") if epoch["optimizer"] == interrupted]) == 2
    before = (tmp_path / "halted/steps.csv").read_text()
    assert main(["train", "--resume", "halted"]) == 0
    assert metrics(tmp_path / "halted") == metrics(straight)
    assert (tmp_path / "halted/steps.csv").read_text().startswith(before)  # with the seconds of before
    for name in NAMES:
        assert_same(checkpoint(tmp_path / "halted", name), checkpoint(straight, name))
    assert len(json.loads((tmp_path / "halted/machine.json").read_text())) == 2
    assert not list((tmp_path / "halted").rglob("*.tmp"))


def test_ctrl_c_before_training_leaves_nothing(tmp_path, monkeypatch, capsys):
    interrupt_at(0, monkeypatch)
    assert train_small("run") == 130
    assert "before training" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_process_with_130_and_it_can_go_on(tmp_path):
    run = ["train", *SMALL, "--optimizer", "sgd", "--epochs", "100000", "--out", "run"]
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS, *run], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == "tengrad-triton: interrupted: go on with `tengrad-triton train --resume run`\n"
    epochs = checkpoint(tmp_path / "run", "sgd")["rows"]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, len(epochs) + 1))
    assert epochs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train SGD for two epochs, once for the tests that do not change the folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with a_quick_command():
        assert train_small(folder, "--epochs", "2", "--optimizer", "sgd", "--sgd.lr", "0.05") == 0
    return folder


def test_a_finished_run_is_shown_again(run, capsys):
    before = metrics(run)
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0  # a flag that agrees
    assert "sgd " in capsys.readouterr().out
    assert metrics(run) == before


CONTRADICTIONS = {
    "--epochs": (["--epochs", "5"], "--epochs 5: this run has 2"),
    "--sgd.lr": (["--sgd.lr", "0.5"], "--sgd.lr 0.5: this run has 0.05"),
    "--optimizer": (["--optimizer", "adamw"], "--optimizer ['adamw']: this run has ['sgd']"),
    "--out": (["--out", "other"], "--out other"),
}


@pytest.mark.parametrize("flag", CONTRADICTIONS)
def test_flags_that_contradict_the_run_are_refused(run, flag, capsys):
    arguments, message = CONTRADICTIONS[flag]
    assert main(["train", "--resume", str(run), *arguments]) == 2
    assert message in one_line(capsys)


DAMAGES = {
    "checkpoint": ("checkpoints/sgd.pt", b"PK", "sgd.pt: damaged"),
    "empty checkpoint": ("checkpoints/sgd.pt", b"", "sgd.pt: damaged"),
    "settings": ("settings.json", b"{", "settings.json"),
    "other settings": ("settings.json", b'{"widht": 3}', "widht"),
    "no settings": ("settings.json", b"[]", "settings.json"),
    "other weights": (
        "settings.json",
        b'{"optimizer": ["sgd"], "model": "3c1f", "dataset": "digits", "epochs": 2, "batch_size": 64, "seed": 0}',
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_one_line(case, run, tmp_path, capsys):
    name, content, message = DAMAGES[case]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    assert main(["train", "--resume", "run"]) == 2
    assert message in one_line(capsys)
