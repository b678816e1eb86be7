"""The rates of `train` by data set and model: an explicit flag wins, and a run that is resumed keeps its own."""

import json

import pytest
from helpers.commands import a_quick_command, one_line, train_small
from helpers.image_files import write_folder

from tengrad_triton.recipes.cli.commands import parse
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.training.settings import Settings


def settings_of(*arguments):
    return parse(["train", *arguments]).settings


def test_digits_have_the_optimizers_own_defaults():
    assert settings_of() == settings_of("--dataset", "digits") == Settings()


# The arguments, and the index of the experiment whose tuned values they get.
CASES = {
    ("--dataset", "fashion-mnist"): 0,
    ("--dataset", "fashion-mnist", "--model", "mlp"): 0,
    ("--dataset", "cifar10"): 1,
    ("--dataset", "cifar10", "--model", "wrn-16-8"): 1,
    ("--model", "wrn-10-1", "--dataset", "cifar100"): 2,
    ("--dataset", "cifar10", "--model", "densenet-40-12"): 3,
    ("--dataset=cifar100", "--model=mobilenetv2"): 6,
    ("--dataset", "cifar100", "--model", "resnet18"): 2,
}


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_other_data_sets_have_what_the_paper_tuned(arguments):
    settings, tuned = settings_of(*arguments), EXPERIMENTS[CASES[arguments]].tuned
    for name in OPTIMIZERS:
        own = settings.of(name)
        expected = tuned.get("kbfgs" if name == "kbfgsl" else name)
        if name == "adamw":
            assert (own.lr, own.weight_decay) == (1e-3, 0.01)  # torch's
        elif expected is None:
            assert own == OPTIMIZERS[name]()
        else:
            assert (own.lr, own.weight_decay, *([own.damping] if len(expected) > 2 else [])) == expected
    assert (settings.tengrad, settings.tengrad_unscaled) == (Settings().tengrad, Settings().tengrad_unscaled)


def test_a_flag_wins_and_leaves_the_rest():
    own = settings_of(
        "--dataset", "cifar10", "--tengrad-paper.lr", "0.005", "--optimizer", "tengrad-paper"
    ).tengrad_paper
    assert (own.lr, own.weight_decay, own.damping) == (0.005, 0.003, 0.1)


@pytest.mark.parametrize("words", [("tengrad_paper", "sgd"), ("tengrad-paper", "sgd")])
def test_a_name_may_have_hyphens(words):
    assert settings_of("--optimizer", *words).optimizer == ("tengrad_paper", "sgd")
    assert parse(["paper", "table2", "--optimizer", *words]).request.optimizer == ("tengrad_paper", "sgd")


def test_the_help_says_the_rates(capsys):
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Learning rate, weight decay and damping depend on the data set" in shown
    assert "fashion-mnist: tengrad_paper 0.003, 0.001, 0.1; sgd 0.03, 0.001; adamw 0.001, 0.01" in shown


def test_a_run_that_is_resumed_keeps_its_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data")
    with a_quick_command():
        local = ["--dataset", "fashion-mnist", "--data", "data", "--epochs", "1", "--optimizer", "sgd"]
        assert train_small("run", *local, "--sgd.momentum", "0.5") == 0
        file = tmp_path / "run/settings.json"
        stored = json.loads(file.read_text())
        assert stored["sgd"] == {"lr": 0.03, "momentum": 0.5, "weight_decay": 0.001}
        stored["sgd"] = {"lr": 0.05, "weight_decay": 0.003}  # as before rates depended on the data set
        file.write_text(json.dumps(stored))
        assert main(["train", "--resume", "run"]) == 0
        assert main(["report", "run", "--to", "page.md"]) == 0
        assert "- sgd: lr 0.05, momentum 0.9, weight_decay 0.003" in (tmp_path / "page.md").read_text()
        assert main(["train", "--resume", "run", "--sgd.lr", "0.03"]) == 2
    assert "--sgd.lr 0.03: this run has 0.05" in one_line(capsys)
