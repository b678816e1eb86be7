"""`tengrad-triton` end to end: whole runs, one line for every mistake, and going on when interrupted."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
from test_data import write_folder
from test_train import assert_same

from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.training import loop as train
from tengrad_triton.recipes.training.settings import Settings

NAMES = Settings().optimizer
SMALL = ["--device", "cpu", "--threads", "1", "--width", "4", "--train-limit", "150", "--test-limit", "50"]
# Three steps an epoch, so that no epoch ends at a refresh.
SMALL += ["--batch-size", "64", "--tengrad.refresh-every", "4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, and give torch its threads back."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def train_small(out, *more):
    return main(["train", *SMALL, "--out", str(out), *more])


def metrics(run):
    """Return the rows of metrics.json without the seconds, which no two runs share."""
    rows = json.loads((run / "metrics.json").read_text())
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


def checkpoint(run, name):
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)


def one_line(capsys):
    """Return what stderr holds, which must be a single line without a traceback."""
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert error.startswith("tengrad-triton: ")
    return error


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_the_table_compares_with_sgd(tmp_path, capsys):
    assert train_small(tmp_path / "run", "--epochs", "1", "--optimizer", "sgd", "adamw") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = [line.split() for line in shown.out.splitlines()]
    (sgd,) = [line for line in lines if line[:1] == ["sgd"] and line[1] != "epoch"]
    (adamw,) = [line for line in lines if line[:1] == ["adamw"] and line[1] != "epoch"]
    assert sgd[-1] == "1.00"
    assert float(adamw[-1]) > 0
    assert adamw[1] == f"{metrics(tmp_path / 'run')[1]['test_accuracy']:.2%}"


def test_the_default_folder_is_named_after_data_and_model(tmp_path):
    assert main(["train", *SMALL, "--epochs", "1", "--optimizer", "sgd", "--model", "mlp"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-mlp-\d{8}-\d{6}", folder.name)


@pytest.mark.parametrize(("dataset", "columns"), [("fashion-mnist", ()), ("cifar100", ("img", "fine_label", "RGB"))])
def test_local_parquet_trains(tmp_path, dataset, columns):
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", *columns)
    assert train_small("run", "--dataset", dataset, "--data", "data", "--epochs", "1", "--optimizer", "sgd") == 0
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["data"] == str(tmp_path / "data")  # absolute, so that --resume works from anywhere
    assert main(["train", "--resume", "run", "--data", "data"]) == 0


@pytest.mark.parametrize("name", ["tengrad", "sgd"])
def test_a_diverging_optimizer_does_not_stop_the_others(name, tmp_path, capsys):
    wild = ["--optimizer", name, "adamw", f"--{name}.lr", "1e30", "--tengrad.refresh-every", "1"]
    assert main(["train", *SMALL[:-2], *wild, "--out", "run", "--epochs", "2"]) == 0
    assert f"{name} diverged in epoch 1: lower --{name}.lr" in capsys.readouterr().out
    losses = [(row["optimizer"], row["train_loss"] is None) for row in metrics(tmp_path / "run")]
    assert losses == [(name, True), ("adamw", False), ("adamw", False)]


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "command": (["trian"], "trian"),
    "flag": (["train", "--learning-rate", "1"], "--learning-rate"),
    "stray value": (["train", "3"], "3"),
    "optimizer": (["train", "--optimizer", "sgd", "adam"], '"tengrad", "sgd", "adamw", "tengrad_defaults", "kfac"'),
    "no optimizer": (["train", "--optimizer"], "at least one"),
    "optimizer twice": (["train", "--optimizer", "sgd", "sgd"], "once"),
    "model": (["train", "--model", "resnet"], "choose from 3c1f, mlp, "),
    "data set": (["train", "--dataset", "mnist"], '"fashion-mnist"'),
    "no number": (["train", "--width", "wide"], "--width"),
    "no value": (["train", "--epochs"], "--epochs"),
    "zero epochs": (["train", "--epochs", "0"], "Must be > 0"),
    "negative rate": (["train", "--sgd.lr", "-1"], "--sgd.lr"),
    "negative seed": (["train", "--seed", "-1"], "--seed"),
    "huge seed": (["train", "--seed", str(2**32)], "--seed"),
    "momentum": (["train", *SMALL, "--tengrad.momentum", "1.5"], "momentum must be"),
    "beta": (["train", *SMALL, "--optimizer", "adamw", "--adamw.betas", "2", "0.9"], "beta"),
    "missing folder": (["train", "--dataset", "cifar10", "--data", "nowhere"], "does not exist"),
    "folder of digits": (["train", "--data", "."], "scikit-learn"),
    "no Parquet": (["train", "--dataset", "cifar10", "--data", "."], "no test-*.parquet"),
    "no run": (["train", "--resume", "nowhere"], "settings.json"),
    "out of a file": (["train", *SMALL, "--out", sys.executable + "/run"], "cannot be made"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    arguments, message = MISTAKES[case]
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_line(tmp_path, capsys):
    assert main(["train", "--device", "cuda"]) == 2
    assert "--device cpu" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_images_too_small_for_the_model_are_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", count=2, size=(2, 5))
    assert main(["train", "--dataset", "fashion-mnist", "--data", "data"]) == 2
    assert "got images of 2 x 5" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_overwritten(kind, tmp_path, capsys):
    taken = tmp_path / "taken"
    if kind == "folder":
        taken.mkdir()
    (taken / "mine" if kind == "folder" else taken).write_text("mine")
    assert train_small(taken) == 2
    assert "already there" in one_line(capsys)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]


def test_an_empty_folder_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert train_small("run", "--epochs", "1", "--optimizer", "sgd") == 0


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tengrad_triton.recipes.cli.commands")
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert main(["--version"]) == 2
    assert "pip install 'tengrad-triton[train]'" in one_line(capsys)


# -- interruptions ---------------------------------------------------------------------------------------------------


def interrupt_at(step, monkeypatch):
    """Have Ctrl-C come in the given step of training."""
    original, taken = train.one_step, iter(range(10**6))

    def interrupted(*arguments):
        if next(taken) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train, "one_step", interrupted)


@pytest.mark.parametrize("interrupted", NAMES)
def test_an_interrupted_run_goes_on_bit_for_bit(interrupted, tmp_path, monkeypatch, capsys):
    """Interrupted in the second step of the third epoch of one optimizer."""
    warm_up, epoch = 2 * len(NAMES), 3
    with monkeypatch.context() as patch:
        interrupt_at(warm_up + 3 * epoch * NAMES.index(interrupted) + 2 * epoch + 1, patch)
        assert train_small("halted", "--epochs", "3") == 130
    assert "--resume halted" in one_line(capsys)
    assert len([row for row in metrics(tmp_path / "halted") if row["optimizer"] == interrupted]) == 2
    before = (tmp_path / "halted/steps.csv").read_text()
    assert main(["train", "--resume", "halted"]) == 0
    assert train_small("straight", "--epochs", "3") == 0
    assert metrics(tmp_path / "halted") == metrics(tmp_path / "straight")
    assert (tmp_path / "halted/steps.csv").read_text().startswith(before)  # with the seconds of before
    for name in NAMES:
        assert_same(checkpoint(tmp_path / "halted", name), checkpoint(tmp_path / "straight", name))
    assert len(json.loads((tmp_path / "halted/machine.json").read_text())) == 2
    assert not list((tmp_path / "halted").rglob("*.tmp"))


def test_ctrl_c_before_training_leaves_nothing(tmp_path, monkeypatch, capsys):
    interrupt_at(0, monkeypatch)
    assert train_small("run") == 130
    assert "before training" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_process_with_130_and_it_can_go_on(tmp_path):
    command = [sys.executable, "-c", "import sys; from tengrad_triton.recipes.cli.main import main; sys.exit(main())"]
    asked = [*command, "train", *SMALL, "--optimizer", "sgd", "--epochs", "100000", "--out", "run"]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "tengrad-triton: interrupted: go on with `tengrad-triton train --resume run`\n"
    rows = checkpoint(tmp_path / "run", "sgd")["rows"]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train SGD for two epochs, once for the tests that do not change the folder."""
    folder, threads = tmp_path_factory.mktemp("runs") / "run", torch.get_num_threads()
    assert train_small(folder, "--epochs", "2", "--optimizer", "sgd", "--sgd.lr", "0.05") == 0
    torch.set_num_threads(threads)
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
    "other weights": ("settings.json", b'{"optimizer": ["sgd"], "width": 5, "epochs": 2}', "does not fit"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_one_line(case, tmp_path, capsys):
    name, content, message = DAMAGES[case]
    assert train_small("run", "--epochs", "1", "--optimizer", "sgd") == 0
    (tmp_path / "run" / name).write_bytes(content)
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 2
    assert message in one_line(capsys)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("tengrad-triton")


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_the_help_names_the_command(arguments, capsys):
    assert main(arguments) == 0
    assert "train" in capsys.readouterr().out


def test_the_help_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrower terminal breaks the longest flags at a hyphen
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    flags = train.Settings().flags()
    missing = [flag for flag in [*flags, "--data", "--threads", "--out", "--resume"] if f"{flag} " not in shown]
    assert missing == []
