"""`tengrad-triton autotune` and `plan show`, end to end."""

import io
import json

import pytest
from helpers.commands import a_quick_command
from rich.console import Console

from tengrad_triton.recipes.cli.autotune import table_of
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.tuning.plan import Measured, Plan

SMALL = ["autotune", "--width", "4", "--batch-size", "16", "--seconds", "0.001", "--device", "cpu"]


@pytest.fixture
def plan(tmp_path):
    return tmp_path / "plan.json"


def test_autotune_shows_what_it_keeps(plan, capsys):
    assert main([*SMALL, "--bf16", "--plan", str(plan)]) == 0
    shown = capsys.readouterr().out
    entries = json.loads(plan.read_text())["entries"]
    assert len(entries) == 4
    assert all(set(entry) == {"factored", "per_sample", "per_sample_bf16"} for entry in entries.values())
    assert "runner-up" in shown
    assert main(["plan", "show", str(plan)]) == 0
    again = capsys.readouterr().out
    assert again.split("from ")[0].split() == shown.split("kept in ")[0].split()


def test_the_table_names_configurations():
    seconds = {
        "conv_sample_grads": {"torch": 2e-4, "triton": 1e-4, "narrow": 5e-5},
        "gram_rows": {"torch": 1e-4, "triton": 2e-4},
        "project_rows": {"torch": 2e-4, "triton": 1e-4},
    }
    plan = Plan({"N128 G1 P784 I1152 O128 3x3 32-bit": {"per_sample": Measured(seconds, 2**20)}})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table_of(plan, 1))
    words = console.export_text().split()
    assert {"per_sample", "conv_sample_grads:narrow", "gram_rows:torch", "250", "1.0", "-"} <= set(words)
    assert not any("project_rows" in word for word in words)


def test_training_takes_the_plan(plan, tmp_path):
    assert main([*SMALL, "--plan", str(plan)]) == 0
    flags = ["--width", "4", "--batch-size", "16", "--train-limit", "32", "--epochs", "1", "--optimizer", "tengrad"]
    run, page = str(tmp_path / "run"), str(tmp_path / "page.md")
    with a_quick_command():
        assert main(["train", *flags, "--device", "cpu", "--tengrad.plan", str(plan), "--out", run]) == 0
        assert main(["report", run, "--to", page]) == 0
    assert str(tmp_path) not in (tmp_path / "page.md").read_text()


# Arguments, and what the one line says.
MISTAKES = {
    "no plan": (["plan", "show", "nowhere.json"], "nowhere.json: no such plan"),
    "no action": (["plan"], "requires an argument"),
    "another action": (["plan", "delete"], 'Choose from: "show"'),
    "unknown model": (["autotune", "--model", "vgg"], "choose from 3c1f, mlp, "),
    "no time": ([*SMALL, "--seconds", "0"], "--seconds"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line(case, capsys):
    arguments, message = MISTAKES[case]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_plan_that_does_not_hold_here_says_why(plan, capsys):
    assert main([*SMALL, "--plan", str(plan)]) == 0
    content = json.loads(plan.read_text())
    content["header"]["torch"] = "1.0"
    plan.write_text(json.dumps(content))
    assert main(["plan", "show", str(plan)]) == 2
    assert "measured with torch '1.0'" in capsys.readouterr().err
