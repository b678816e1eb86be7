"""`tengrad-triton paper` is interrupted, and refuses mistakes in one line."""

import errno
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.commands import PROCESS, one_line
from helpers.paper import arguments, figures_not_rendered, outcomes, run

from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.training import loop


def test_a_kill_loses_no_finished_run_and_at_most_the_current_epoch(data, tmp_path):
    words = ["table2", "--row", "3C1F", "--seeds", "1", "--optimizer", "sgd", "adamw"]
    command = arguments(data, tmp_path / "out", *words, epochs=40)
    folders = [tmp_path / "out/runs" / EXPERIMENTS[0].key / f"{name}-seed0" for name in ("sgd", "adamw")]
    with subprocess.Popen([sys.executable, "-c", PROCESS, *command], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (folders[1] / "metrics.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = json.loads((folders[1] / "metrics.json").read_text())
    finished = (folders[0] / "outcome.json").stat().st_mtime_ns
    with figures_not_rendered():
        assert main(command) == 0
    assert (folders[0] / "outcome.json").stat().st_mtime_ns == finished
    epochs = json.loads((folders[1] / "outcome.json").read_text())["rows"]
    assert len(epochs) == 40
    assert epochs[: len(before)] == before  # with the seconds of before
    assert len(json.loads((folders[1] / "machine.json").read_text())) == 2


def test_ctrl_c_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "one_step", interrupted)
    assert run(data, tmp_path / "out", "table2", "--row", "3C1F", "--optimizer", "sgd") == 130
    assert "give the same command again" in one_line(capsys)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(data, tmp_path, monkeypatch, capsys):
    words = ["table2", "--row", "3C1F", "--optimizer", "sgd", "--seeds", "1"]
    saved, written = torch.save, []

    def full(*arguments):
        written.append(1)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run(data, tmp_path / "out", *words) == 2
    assert "No space left on device): make room, and give the same command again" in one_line(capsys)
    with figures_not_rendered():
        assert run(data, tmp_path / "out", *words) == 0
    (outcome,) = outcomes(tmp_path / "out").values()
    assert len(outcome["rows"]) == 2


def test_a_diverged_run_advises_no_flag_of_another_command(data, tmp_path, capsys):
    words = ["figure9", "--row", "3C1F", "--optimizer", "sgd", "--seeds", "1", "--grid.lr", "1e30"]
    with figures_not_rendered():
        assert run(data, tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    assert "tengrad_paper diverged in epoch 1: the report says so\n" in shown
    assert "lower --" not in shown


MISTAKES = {
    "target": (
        ["table9"],
        "tengrad-triton: TARGETS: 'table9' is not known (did you mean 'table2' or 'table1'?): choose from all, ",
    ),
    "targets in order": (
        ["x"],
        "'x' is not known: choose from all, figure1, figure4, figure5, figure6, figure7, figure8",
    ),
    "target within another": (["table3"], "'table3' is not known (did you mean 'tables3-5'?)"),
    "target in capitals": (["Figure6"], "'Figure6' is not known (did you mean 'figure6'?)"),
    "a drawing": (["figure2"], "TARGETS: figure2 is a drawing of the methods: there is nothing to run. See tengrad"),
    "no target": ([], "no target: name one or several of all, figure1"),
    "row": (
        ["table2", "--row", "VGG"],
        "--row VGG: no such row: choose from 3C1F, Fashion-MNIST; WideResNet, CIFAR-10",
    ),
    "row of another figure": (["figure12", "--row", "3C1F"], "figure12 shows WideResNet, CIFAR-10"),
    "optimizer": (["table2", "--optimizer", "adam"], '"tengrad", "tengrad_paper", "sgd"'),
    "optimizer twice": (["table2", "--optimizer", "sgd", "sgd"], "once"),
    "nothing to measure": (["table1", "--optimizer", "tengrad"], "table1 measures optimizers that refresh"),
    "scale": (["table2", "--scale.epochs", "0"], "--scale.epochs"),
    "no data": (
        ["table2", "--data", "."],
        "no test-*.parquet in it, nor in a folder fashion-mnist or fashion_mnist of it",
    ),
    "missing package": (["table2", "--optimizer", "soap"], "pip install 'tengrad-triton[rivals]'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert main(["paper", *arguments]) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []
