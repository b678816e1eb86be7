"""The benchmarks run end to end, their page says what was measured, and their baseline takes TENGraD's steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.image_files import write_folder

ROOT = Path(__file__).parent.parent


def run(*arguments, stdin=None):
    command = [sys.executable, *arguments]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, nor in what a worker starts.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    assert page.count("mean step over SGD's") == 8
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
import perf.training, perf.suites, perf.gpu, perf.__main__
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
RUN_CHECKS = """
import json, sys, traceback
for name in ("rich", "cyclopts", "datasets", "tensorboard"):
    sys.modules[name] = None
errors = {}
for name, code in json.load(sys.stdin).items():
    try:
        exec(code, {})
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors():
    return json.loads(run("-c", RUN_CHECKS, stdin=json.dumps(CHECKS)))


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds_that(check, errors):
    assert check not in errors, errors[check]


def test_the_gpu_command_trains_from_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", count=100, size=(28, 28))
    out = tmp_path / "results" / "there"
    arguments = ("--device", "cpu", "--quick", "--only", "training", "--data", str(tmp_path / "data"))
    run("-m", "perf.gpu", "--out", str(out), "--commit", "0123456789ab", *arguments)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["parts"]["training"]["ended"] == ["finished"]
    sgd = json.loads((out / "training.json").read_text())["cases"][1]
    assert (sgd["optimizer"], sgd["seeds"], len(sgd["runs"][1])) == ("sgd", 2, 1)
    page = "import sys, pathlib, perf.report as r; r.generate(*map(pathlib.Path, sys.argv[1:]))"
    run("-c", page, str(out.parent), str(tmp_path / "page.md"))
    assert "| sgd | 2 | 1 |" in (tmp_path / "page.md").read_text()
