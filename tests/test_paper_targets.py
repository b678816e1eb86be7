"""Every target of `tengrad-triton paper` gets its runs and figures, and searches try every point."""

import json

import pytest
from helpers.pages import table_after
from helpers.paper import figures_not_rendered, outcomes, run

from tengrad_triton.recipes.paper.report import page
from tengrad_triton.recipes.paper.request import OF_RUNS, Request
from tengrad_triton.recipes.paper.runs import runs_of


@pytest.fixture(scope="module")
def every(data, tmp_path_factory):
    """Train SGD for an epoch on every experiment."""
    out = tmp_path_factory.mktemp("every") / "out"
    with figures_not_rendered():
        assert run(data, out, *OF_RUNS, "--seeds", "1", "--optimizer", "sgd", epochs=1) == 0
    return out


@pytest.mark.parametrize("target", OF_RUNS)
def test_every_target_of_runs_gets_its_figures(target, every):
    text = (every / "paper.md").read_text()
    request = Request(seeds=1, optimizer=("sgd",))
    experiments = OF_RUNS[target][1]
    assert {run.experiment.key for run in runs_of(request, (target,))} == {e.key for e in experiments}
    for e in experiments:
        assert (every / "runs" / e.key / "sgd-seed0" / "outcome.json").exists()
        assert table_after(f"## Table 2: {e.title}", text)["sgd"][0] == f"{e.reported['sgd'][1]:.2f} %"
        quantities = ("train_loss", "train_accuracy", "test_accuracy")
        shown = [quantity for quantity in quantities if target in page.figures_of(e.title, quantity)]
        assert shown or target == "table2"
        for quantity in shown:
            assert (every / f"figures/paper-{e.key}-{quantity}.png").exists()


@pytest.mark.parametrize("target", ["figure10", "tables3-5"])
def test_searches_try_every_point(target, data, tmp_path):
    grid = ["--grid.lr", "0.003", "0.01", "--grid.weight-decay", "0.001", "--grid.damping", "0.1"]
    words = ["--seeds", "1", "--row", "3C1F", "--optimizer", "tengrad_paper", "sgd"]
    with figures_not_rendered():
        assert run(data, tmp_path / "out", target, *words, *grid, epochs=1) == 0
    names = ["tengrad_paper"] if target == "figure10" else ["tengrad_paper", "sgd"]
    labels = {f"{name}-{lr}-0.001{'-0.1' * (name != 'sgd')}-seed0" for name in names for lr in (0.003, 0.01)}
    assert set(outcomes(tmp_path / "out", "grid")) == labels
    table = table_after("Learning rate, weight decay", (tmp_path / "out/paper.md").read_text())
    assert table["3C1F, Fashion-MNIST"][-1] == "0 of 2"


def test_peaks_are_measured_in_processes_of_their_own(data, tmp_path):
    assert run(data, tmp_path / "out", "memory", "--optimizer", "sgd", "tengrad") == 0
    peaks = json.loads((tmp_path / "out/results/memory.json").read_text())["bytes"]
    table = table_after("## Peak memory", (tmp_path / "out/paper.md").read_text())
    assert table["sgd"] == [f"{peaks['sgd'] / 2**20:.0f}", "1.00"]
    assert table["tengrad"] == [f"{peaks['tengrad'] / 2**20:.0f}", f"{peaks['tengrad'] / peaks['sgd']:.2f}"]
