"""`tengrad-triton paper` makes a whole small report: its numbers are those of the files, and nothing is done twice."""

import json
import re
from statistics import mean

import pytest
from helpers.commands import one_line
from helpers.pages import table_after
from helpers.paper import figures_not_rendered, measured_at_a_tiny_scale, outcomes, run
from PIL import Image

from tengrad_triton.recipes.paper.measurements import inverses

NAMES = ("tengrad_paper", "sgd", "kfac", "adamw")
BLOCKS = ("figure6", "figure7", "figure8")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Make one report with everything that is measured beside the runs."""
    out = tmp_path_factory.mktemp("paper") / "out"
    words = ["table2", *BLOCKS, "figure9", "table1", "phases", "--row", "3C1F", "--seeds", "2"]
    grid = ["--grid.lr", "0.003", "1e30", "--grid.damping", "0.1", "0.3"]
    with measured_at_a_tiny_scale():
        assert run(data, out, *words, "--optimizer", *NAMES, *grid) == 0
    return out


def test_a_run_is_one_optimizer_from_one_seed(whole):
    assert set(outcomes(whole)) == {f"{name}-seed{seed}" for name in NAMES for seed in (0, 1)}
    for outcome in outcomes(whole).values():
        assert [epoch["epoch"] for epoch in outcome["rows"]] == [1, 2]
        assert all(epoch["train_seconds"] > 0 < epoch["cpu_seconds"] for epoch in outcome["rows"])
    assert not list(whole.rglob("*.pt"))  # a finished run needs no checkpoint
    assert not list(whole.rglob("*.tmp"))


def test_the_papers_numbers_stand_beside_ours(whole):
    text = (whole / "paper.md").read_text()
    table = table_after("## Table 2: 3C1F, Fashion-MNIST", text)
    assert list(table) == ["tengrad_paper", "sgd", "adamw", "kfac"]
    assert [table[name][:2] for name in NAMES] == [
        ["93.15 %", "43 s"],
        ["92.60 %", "52 s"],
        ["92.20 %", "188 s"],
        ["-", "-"],
    ]
    for name in NAMES:
        tops = [
            max(100 * epoch["test_accuracy"] for epoch in outcome["rows"])
            for label, outcome in outcomes(whole).items()
            if label.startswith(f"{name}-")
        ]
        assert table[name][2].startswith(f"{mean(tops):.2f} ± ")
    assert "\nScale: width 4, epochs 2, batch 16. With 24 test images a single accuracy" in text
    assert "| WideResNet, CIFAR-10 | 94.01 % in 1128 s | 94.10 % in 1108 s | not measured |" in text
    assert "On a GPU, at the paper's own scale: not measured." in text


def test_the_distances_are_those_of_the_files(whole):
    text = (whole / "paper.md").read_text()
    for name in BLOCKS:
        found = json.loads((whole / f"results/{name}.json").read_text())
        table = table_after(f"## Figure {name.removeprefix('figure')}:", text)
        assert set(table) == set(found["distances"]) == set(inverses.METHODS)
        assert found["distances"]["exact NGD"] == pytest.approx({"relative": 0, "of curvature": 0, "cosine": 1})
        for method, cells in table.items():
            assert cells == [f"{number:.4f}" for number in found["distances"][method].values()]


def test_costs_and_phases_are_those_of_the_files(whole):
    text = (whole / "paper.md").read_text()
    costs = json.loads((whole / "results/table1.json").read_text())["cases"]
    assert {(case["optimizer"], case["quantity"]) for case in costs} == {
        (name, quantity) for name in ("tengrad_paper", "kfac") for quantity in ("batch", "width", "depth")
    }
    for cost in ("curvature", "step"):  # a difference of times may be negative at such sizes: there is no exponent then
        fits = [case["exponents"].get(cost) for case in costs if case["optimizer"] == "kfac"]
        cells = table_after("## Table 1:", text)[f"kfac, {cost}"]
        assert cells[1:] == ["-" if fit is None else f"{fit:.2f}" for fit in fits]
    seconds = json.loads((whole / "results/phases.json").read_text())["seconds"]
    assert set(seconds) == set(NAMES)
    for name in ("tengrad_paper", "kfac"):
        assert seconds[name]["refresh"]["curvature"] > 0 == seconds[name]["reuse"]["curvature"]
        assert min(seconds[name]["reuse"][part] for part in ("forward and backward", "solve", "update")) > 0
    assert set(seconds["adamw"]) == {"reuse"}
    assert seconds["adamw"]["reuse"]["update"] > 0


def test_a_diverged_point_is_recorded_and_the_rest_goes_on(whole):
    grid = outcomes(whole, "grid")
    diverged = {label for label, outcome in grid.items() if outcome["diverged"]}
    assert len(grid) == 8
    assert diverged == {label for label in grid if "1e+30" in label}
    assert all(len(grid[label]["rows"]) == 1 for label in diverged)
    assert (
        table_after("Learning rate, weight decay", (whole / "paper.md").read_text())["3C1F, Fashion-MNIST"][-1]
        == "2 of 4"
    )


def test_every_figure_of_the_page_is_there_and_in_the_html(whole):
    text, html = ((whole / name).read_text() for name in ("paper.md", "paper.html"))
    files = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(files) == 4 + len(BLOCKS) + 2 + 2  # an experiment's quantities, blocks, sensitivity, table 1 and phases
    assert html.count("<img") == len(files)
    assert html.count("<table>") == len(re.findall(r"^\| ---", text, re.MULTILINE))
    for file in files:
        assert f'src="{file}"' in html
        with Image.open(whole / file) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_nothing_that_is_shown_names_a_place_of_the_machine(whole, data):
    for name in ("paper.md", "paper.html", "paper.json"):
        text = (whole / name).read_text()
        assert str(data) not in text
        assert str(whole) not in text
        assert "--data DIR --out OUT" in text or name == "paper.json"


def test_the_same_command_again_does_nothing_again(whole, data, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("outcome.json")}
    with figures_not_rendered():
        assert run(data, whole, "table2", "--row", "3C1F", "--seeds", "2", "--optimizer", *NAMES) == 0
    assert "to do: nothing" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in whole.rglob("outcome.json")}


def test_another_scale_needs_another_folder(whole, data, capsys):
    words = ["table2", "--row", "3C1F", "--optimizer", "sgd", "--seeds", "1", "--scale.train-images", "20"]
    assert run(data, whole, *words) == 2
    assert "was run with another train_limit" in one_line(capsys)
    assert run(data, whole, "figure6", "--scale.train-images", "20") == 2
    assert "was measured at another scale" in one_line(capsys)
