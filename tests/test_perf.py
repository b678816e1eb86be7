"""The benchmarks run end to end, their page says what was measured, and their baseline takes TENGraD's steps."""

import json
from pathlib import Path

import pytest
from helpers.processes import ROOT, errors_of, run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    suites = ("kernels", "steps", "optimizers", "scaling", "memory")
    return folder, run("-m", "perf", "--quick", "--only", *suites, "--device", "cpu", "--out", str(folder / "here"))


def test_a_quick_run_says_a_line_a_case_and_writes_a_file_a_suite(quick):
    folder, said = quick
    for line in ("[cholesky", "steps: tiny 3C1F, N = 8", "scaling: cost by width", "memory of tiny 3C1F"):
        assert line in said
    for suite in ("kernels", "steps", "optimizers", "scaling", "memory"):
        document = json.loads((folder / "here" / f"{suite}.json").read_text())
        assert {"device", "torch", "triton", "commit", "started"} <= set(document["machine_info"])
        assert document["suite"] == suite
        assert document["benchmarks"] if suite == "kernels" else document["cases"]


def test_the_page_has_the_targets_and_what_was_measured(quick):
    folder, _ = quick
    page = (folder / "performance.md").read_text()
    steps = json.loads((folder / "here" / "steps.json").read_text())["cases"]
    assert f"| {steps[0]['mean_over_sgd']:.2f} |" in page
    assert "| GPU | ≥ 60% | – | not measured |" in page
    assert page.count("mean step over SGD's") == 5 + 8
    assert "No kernel of this project has run on a GPU yet" in page
    for figure in ("steps", "scaling", "kernels"):
        assert (folder / "figures" / f"performance-here-{figure}.png").exists()
        assert f"(figures/performance-here-{figure}.png)" in page


def test_no_result_names_a_place_of_the_machine(quick):
    folder, _ = quick
    for file in [folder / "performance.md", *(folder / "here").glob("*.json")]:
        text = file.read_text()
        assert not [place for place in (str(ROOT), str(folder), str(Path.home())) if place in text], file.name


# These tests do not import perf: one process runs all of this, without the packages that a GPU machine need not have.
CHECKS = {
    "a GPU machine needs no package of the command line": """
import perf.suites, perf.__main__, perf.gpu.__main__, perf.gpu.pieces.__main__
""",
    "the page judges numbers as it prints them": """
from perf.targets import Target
target = Target("", "cpu", 1.1, True, None)
assert [target.verdict(x) for x in (1.0, 1.104, 1.106)] == ["met", "met", "missed"]
least = Target("", "cuda", 0.6, False, None, percent=True)
assert (least.wanted(), least.number(0.594), least.verdict(0.594)) == ("≥ 60%", "59%", "missed")
""",
    "the baseline takes TENGraD's steps": """
import torch
from perf import loops, models
torch.set_default_dtype(torch.float64)
loops.SETTINGS["lr"] = 1e-3
made = models.MODELS["tiny 3C1F"]
x, y = made.batch(8, torch.device("cpu"))
weights = []
for make in (loops.tengrad, loops.paper):
    model = made.on(torch.device("cpu"))
    optimizer = make(model, 2)
    for _ in range(4):
        loops.timed_step(model, optimizer, x, y)
    weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
first = torch.cat([p.detach().flatten() for p in made.on(torch.device("cpu")).parameters()])
assert (weights[0] - first).norm() > 1e-4
torch.testing.assert_close(weights[0] - first, weights[1] - first, rtol=1e-10, atol=1e-14)
torch.set_default_dtype(torch.float32)
""",
    "alternatives compute what the kernels do": """
import torch
from perf.alternatives import OTHERS
from tengrad_triton.kernels import SPECS
specs = {spec.name: spec for spec in SPECS}
for name, others in OTHERS.items():
    for example in specs[name].examples.values():
        arguments = example(torch.float32, torch.device("cpu"))
        for work in others.values():
            torch.testing.assert_close(work(*arguments), specs[name].torch_impl(*arguments), rtol=1e-4, atol=1e-3)
""",
    "models have the published numbers of parameters": """
import torch
from perf.models import MODELS
for name, millions in {"ResNet-18": 11.17, "WRN-28-4": 5.87, "3C1F": 5.49}.items():
    count = sum(p.numel() for p in MODELS[name].build().parameters())
    assert abs(count / millions / 1e6 - 1) < 0.01, (name, count)
for name in ("ResNet-18", "WRN-28-4", "transformer"):
    x, _ = MODELS[name].batch(2, torch.device("cpu"))
    assert MODELS[name].build()(x).shape == (2, 10)
""",
}
ABSENT = ("rich", "cyclopts", "datasets", "tensorboard", "matplotlib", "pyarrow", "PIL")


@pytest.fixture(scope="module")
def errors():
    return errors_of(CHECKS, ABSENT)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds_that(check, errors):
    assert check not in errors, errors[check]
