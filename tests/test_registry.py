"""A new optimizer takes what CONTRIBUTING.md says: a dataclass and a line of a table. All commands know it then."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.image_files import write_folder
from helpers.pages import table_after
from helpers.paper import SCALE
from torch import nn

from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS, flag, place
from tengrad_triton.recipes.reports.styles import style_of
from tengrad_triton.recipes.training.settings import _with_optimizers, installed

ROOT = Path(__file__).parent.parent
COMMANDS = """
import json, sys
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.paper.request import Request
assert "nadam" in Request().optimizer
for arguments in json.load(sys.stdin):
    print("=== ", *arguments)
    assert main(arguments) == 0, arguments
"""


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """Copy the package, take the steps of CONTRIBUTING.md in the copy, and run the commands there."""
    folder = tmp_path_factory.mktemp("registered")
    package = shutil.copytree(
        ROOT / "tengrad_triton", folder / "tengrad_triton", ignore=shutil.ignore_patterns("__pycache__")
    )
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (module,) = re.findall(r"   ```python\n(.*?)   ```\n", guide, re.DOTALL)
    (line,) = re.findall(r'`("\w+": \w+,)`', guide)
    optimizers = package / "recipes/optimizers"
    (optimizers / "nadam.py").write_text(re.sub("^   ", "", module, flags=re.MULTILINE))
    table = (optimizers / "registry.py").read_text()
    table = table.replace('    "tengrad": ', f'    {line}\n    "tengrad": ').replace(
        "from tengrad_triton.",
        "from tengrad_triton.recipes.optimizers.nadam import NadamSettings\nfrom tengrad_triton.",
        1,
    )
    (optimizers / "registry.py").write_text(table)
    for name in ("digits", "data/fashion_mnist"):
        (folder / name).mkdir(parents=True)
    write_folder(folder / "data/fashion_mnist", count=24)
    small = ["--width", "4", "--train-limit", "40", "--test-limit", "20", "--epochs", "1", "--device", "cpu"]
    paper = [
        "--row",
        "3C1F",
        "--optimizer",
        "nadam",
        "sgd",
        *SCALE,
        "--scale.epochs",
        "1",
        "--data",
        "data",
        "--seeds",
        "1",
    ]
    commands = [
        ["train", *small, "--optimizer", "nadam", "sgd", "--nadam.lr", "0.003", "--out", "run"],
        ["report", "run", "--to", "page.md"],
        ["paper", "table2", *paper, "--estimate"],
        ["paper", "table2", "phases", *paper, "--out", "paper"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=folder,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "shown.txt").write_text(done.stdout)
    return folder


def test_it_trains_with_its_own_flags_and_is_on_the_page(registered):
    settings = json.loads((registered / "run/settings.json").read_text())
    assert settings["nadam"] == {"lr": 0.003, "weight_decay": 0.0}
    page = (registered / "page.md").read_text()
    assert list(table_after("of digits", page)) == ["nadam", "sgd"]
    assert "--nadam.lr 0.003 --nadam.weight-decay 0.0" in page


def test_the_paper_estimates_trains_and_reports_it(registered):
    shown = (registered / "shown.txt").read_text()
    assert re.search(r"nadam +1 +[\d.]+ s ", shown[shown.index("--estimate") :])  # one run, and its time
    page = (registered / "paper/paper.md").read_text()
    assert list(table_after("## Table 2: 3C1F, Fashion-MNIST", page)) == ["nadam", "sgd"]
    assert "nadam, reuse" in page or "| nadam |" in page
    assert (registered / "paper/figures/paper-3c1f-fashion-mnist-test_accuracy.png").exists()


def test_every_optimizer_has_its_own_look_however_many_there_are(monkeypatch):
    for number in range(40):
        monkeypatch.setitem(OPTIMIZERS, f"new{number}", OPTIMIZERS["sgd"])
    assert len({style_of(name) for name in OPTIMIZERS}) == len(OPTIMIZERS)


def test_a_name_without_an_entry_comes_last():
    assert [place(name) for name in OPTIMIZERS] == list(range(len(OPTIMIZERS)))
    assert place("of an older version") == len(OPTIMIZERS)
    assert len(style_of("of an older version")) == 2


def test_an_optimizer_cannot_take_the_name_of_another_setting(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "epochs", OPTIMIZERS["sgd"])
    with pytest.raises(TypeError, match="'epochs': another setting has this name"):
        _with_optimizers(type("Own", (), {"__annotations__": {"epochs": int}}))


MARKS = {  # what changes with a refresh; for the others, the step of the last refresh, counted from 1
    "soap": lambda optimizer: first_state(optimizer)["Q"][0],
    "shampoo": lambda optimizer: first_state(optimizer)["inv_pre_cond_0"],
}


def first_state(optimizer):
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


@pytest.mark.parametrize("name", [name for name in installed() if OPTIMIZERS[name]().refreshes(9)])
def test_steps_that_refresh_are_those_at_which_the_curvature_changes(name):
    torch.manual_seed(0)
    marks = MARKS.get(name, lambda optimizer: torch.tensor(optimizer._steps - optimizer._age + 1))
    own = OPTIMIZERS[name]().changed(refresh_every=3, lr=1e-4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, refreshed, before = own.build(model), [], torch.zeros(())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        loss.backward()
        return loss

    steps = 5 if name == "shampoo" else 12  # its second root of the factors fails on so few numbers
    for step in range(steps):
        if not own.needs_closure:
            closure()
        optimizer.step(*([closure] if own.needs_closure else []))
        now = marks(optimizer)
        if not torch.equal(now, before.expand_as(now)):
            refreshed.append(step)
        before = now.clone()
    assert refreshed == list(own.refreshes(steps))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_changed_takes_what_an_optimizer_has(name):
    own = OPTIMIZERS[name]()
    changed = own.changed(lr=0.5, refresh_every=7, no_such_setting=1)
    assert changed.lr == 0.5
    assert changed.interval == (7 if own.interval else None)
    assert type(changed) is type(own)
    assert flag(name).replace("-", "_") == f"__{name}"
