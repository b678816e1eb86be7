"""`tengrad-triton train` end to end: whole runs, one line for every mistake, and the help."""

import json
import re
import sys
from importlib.metadata import version

import pytest
import torch
from helpers.commands import SMALL, a_quick_command, metrics, one_line, train_small
from helpers.image_files import write_folder

from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.optimizers.registry import flag
from tengrad_triton.recipes.training.settings import Settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with a_quick_command():
        yield


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


@pytest.mark.parametrize("name", ["tengrad_paper", "sgd"])
def test_a_diverging_optimizer_does_not_stop_the_others(name, tmp_path, capsys):
    wild = ["--optimizer", name, "adamw", f"{flag(name)}.lr", "1e30", "--tengrad-paper.refresh-every", "1"]
    assert main(["train", *SMALL[:-2], *wild, "--out", "run", "--epochs", "2"]) == 0
    assert f"{name} diverged in epoch 1: lower {flag(name)}.lr" in capsys.readouterr().out
    losses = [(row["optimizer"], row["train_loss"] is None) for row in metrics(tmp_path / "run")]
    assert losses == [(name, True), ("adamw", False), ("adamw", False)]


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "command": (["trian"], "trian"),
    "flag": (["train", "--learning-rate", "1"], "--learning-rate"),
    "stray value": (["train", "3"], "3"),
    "optimizer": (
        ["train", "--optimizer", "sgd", "adam"],
        '"tengrad", "tengrad_paper", "sgd", "adamw", "tengrad_unscaled"',
    ),
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
    "momentum": (["train", *SMALL, "--tengrad-paper.momentum", "1.5"], "see the --tengrad-paper flags"),
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


# -- help ------------------------------------------------------------------------------------------------------------


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
    flags = Settings().flags()
    missing = [flag for flag in [*flags, "--data", "--threads", "--out", "--resume"] if f"{flag} " not in shown]
    assert missing == []
