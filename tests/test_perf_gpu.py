"""The two calls of `python -m perf.gpu`: rehearsed on a CPU, their page, their faults, and what they refuse."""

import json
import re

import numpy as np
import pytest
from helpers.image_files import write_folder
from helpers.processes import ROOT, errors_of, run

BOXES = {
    "first": ("right", "trace", "steps", "kernels", "variants"),
    "second": ("right", "steps", "race", "kernels", "memory"),
}
FILES = {
    "first": {"smoke", "trace", "steps", "kernels", "variants"},
    "second": {"smoke", "steps", "race", "kernels", "memory"},
}


@pytest.mark.long
def test_both_calls_are_rehearsed_and_the_page_has_what_came_back(tmp_path):
    # One test, because processes that share the tests would each rehearse.
    said = _rehearsed(tmp_path)
    for call in BOXES:
        _assert_every_box_ran(tmp_path / call, call, said[call])
    _assert_cpus_results_agree_with_torch(tmp_path / "first")
    _assert_page_has_it(tmp_path)


def _rehearsed(folder):
    """Pack images, rehearse both calls, and return what each printed."""
    (folder / "parquet").mkdir()
    pixels, labels = write_folder(folder / "parquet", count=100, size=(28, 28))
    images = folder / "packed" / "images.npz"
    run("-m", "perf.gpu", "data", str(folder / "parquet"), str(images))
    with np.load(images) as packed:
        for part in ("train", "test"):
            assert np.array_equal(packed[f"{part}_images"][:, 0], pixels[part])
            assert np.array_equal(packed[f"{part}_labels"], labels[part])
    data = {"first": [], "second": ["--data", str(images)]}
    rehearsal = ("--rehearse", "--commit", "0123456789ab")
    return {call: run("-m", "perf.gpu", call, *rehearsal, "--out", str(folder / call), *data[call]) for call in BOXES}


def _assert_every_box_ran(folder, call, said):
    documents = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(documents) == FILES[call] | {f"summary-{call}"}
    boxes = documents[f"summary-{call}"]["boxes"]
    assert [box["box"] for box in boxes] == list(BOXES[call])
    endings = {task["task"]: task["ended"] for box in boxes for task in box["tasks"]}
    not_run = {"memory check": "not run: there is no GPU to check"} if call == "first" else {}
    assert {name: ending for name, ending in endings.items() if ending != "finished"} == not_run
    for name in FILES[call]:
        assert documents[name]["cases" if name != "kernels" else "benchmarks"], name
        assert not documents[name].get("skipped"), name
    assert len(list(folder.iterdir())) <= 8
    assert not [file.name for file in folder.iterdir() if str(ROOT) in file.read_text()]
    assert len(said) < 12_000
    assert all(f"== {box}: " in said for box in BOXES[call])


def _assert_cpus_results_agree_with_torch(folder):
    smoke = json.loads((folder / "smoke.json").read_text())["cases"]
    assert all(case["is_rounding"] and not case["why_plain"] for case in smoke)
    assert {case["case"].partition(",")[0] for case in smoke} == {"3C1F", "MLP", "ResNet-18"}
    for case in json.loads((folder / "variants.json").read_text())["cases"]:
        found = {name: found["error_over_torch"] for name, found in case["implementations"].items()}
        found.pop("torch, TF32")  # to which some CPUs round too
        assert set(found.values()) == {1}, case["case"]


GENERATE = "import sys, pathlib, perf.report as r; r.generate(*map(pathlib.Path, sys.argv[1:]))"
NEVER = "No kernel of this project has run on a GPU yet"


def _assert_page_has_it(folder):
    """Make the page as if the results were a GPU's, with the first steps those of a model that has targets."""
    gpu = folder / "results" / "gpu"
    gpu.mkdir(parents=True)
    for path in [*(folder / "first").glob("*.json"), *(folder / "second").glob("*.json")]:
        document = json.loads(path.read_text())
        document["machine_info"] |= {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"}
        if path.stem == "steps":
            document["cases"][0] |= {"model": "3C1F", "samples": 128}
            case = document["cases"][0]
        (gpu / path.name).write_text(json.dumps(document))
    run("-c", GENERATE, str(gpu.parent), str(folder / "page.md"))
    page = (folder / "page.md").read_text()
    assert NEVER not in page
    for title in ("Boxes", "Training against the definitions", "Launch configurations", "Kernels of a step"):
        assert f"\n### {title}\n" in page
    assert "![Test accuracy of 3C1F on Fashion-MNIST by training time" in page
    assert (folder / "figures" / "performance-gpu-race.png").exists()
    assert "best torch with TF32, µs |" in page
    mean, sgd = f"{case['mean_over_sgd']:.2f}", f"{1e3 * case['seconds']['sgd']['median']:.3g}"
    assert f"| mean step over SGD's: 3C1F, N = 128, plain | NVIDIA H100 80GB HBM3 | ≤ 1.25 | {mean} |" in page
    assert re.search(r"time of TENGraD \(paper\) to SGD's best accuracy, over SGD's \| NVIDIA .* \| [\d.inf]+ \|", page)
    assert (
        "| error over torch's, most of all kernels by default | NVIDIA H100 80GB HBM3 | ≤ 2.00 | 1.00 | met |" in page
    )
    assert f"| 3C1F | 152 MB of J twice; 1.3 GFLOP twice | 0.101 | 0.27 to 0.3 | 1.5 to 2 | {sgd} |" in page


CHECKS = {
    "a fault of one task costs no other": """
import pathlib, tempfile, time
from perf.gpu import boxes
boxes.LAST_WORDS = 1
def task(name, code, **more):
    return boxes.Task(name, lambda seconds: ["-c", code, str(seconds)], **more)
asleep = "import time; print('begun', flush=True); time.sleep(60)"
stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" + asleep
lost = "import os, sys; print(sys.argv[1:]); os._exit(0 if '--resume' in sys.argv else 75)"
tasks = [
    task("well", "print('all well')"),
    task("faulty", "print('before'); raise ValueError('reason')"),
    task("slow", asleep),
    task("stubborn", stubborn),
    task("lost", lost, resumes=True),
    task("lost for good", lost),
    task("poor", "", packages=("no_such_package",)),
    task("poorer", "", program="no-such-program"),
    task("impossible", "", impossible="no GPU"),
]
with tempfile.TemporaryDirectory() as folder:
    log = pathlib.Path(folder) / "log.txt"
    start = time.monotonic()
    ended = {e["task"]: e for e in boxes.run(boxes.Box("box", 3, tasks), start + 3, log)}
    assert time.monotonic() - start < 8
    text = log.read_text()
assert {name: e["ended"] for name, e in ended.items()} == {
    "well": "finished",
    "faulty": "failed with exit status 1",
    "slow": "stopped: out of time",
    "stubborn": "failed with exit status -9",
    "lost": "finished",
    "lost for good": "failed with exit status 75",
    "poor": "not run: not installed: no_such_package",
    "poorer": "not run: not installed: no-such-program",
    "impossible": "not run: no GPU",
}, ended
assert ended["well"]["said last"] == "all well"
assert ended["faulty"]["lines"][-1] == "ValueError: reason"
assert ended["faulty"]["seconds"] < 2.9 <= ended["slow"]["seconds"]
assert "==== box: slow" in text and "begun" in text
""",
    "a call whose GPU is lost continues in a new process": """
import json, pathlib, sys, tempfile
import torch
from perf import suites
class Case:
    def __init__(self, name): self.name = name
    def __str__(self): return self.name
    def measure(self, device):
        measured.append(self.name)
        if self.name == "faulty": raise RuntimeError("an illegal memory access")
        return {}
class Lost(BaseException): pass
def leave(status): raise Lost(status)
cases, cpu, works = [Case(name) for name in ("one", "faulty", "two")], torch.device("cpu"), suites.works
assert works(cpu)
with tempfile.TemporaryDirectory() as folder:
    folder, measured = pathlib.Path(folder), []
    suites.works, suites.os._exit, exit = lambda device: False, leave, suites.os._exit
    sys.stdout, printed = sys.stderr, sys.stdout
    try:
        suites.run_cases("lost", cases, cpu, folder, 60)
    except Lost as status:
        assert status.args == (suites.DEVICE_LOST,)
    else:
        raise AssertionError("it went on")
    suites.run_cases("lost", cases, cpu, folder, 60, resume=True)
    suites.works, suites.os._exit, sys.stdout = works, exit, printed
    document = json.loads((folder / "lost.json").read_text())
assert measured == ["one", "faulty", "two"]
assert [case["case"] for case in document["cases"]] == ["one", "two"]
assert document["skipped"] == [{"case": "faulty", "why": "failed with RuntimeError: an illegal memory access"}]
""",
    "no case begins that could not end": """
import json, pathlib, sys, tempfile, types
import torch
from perf import suites
clock = [0.0]
suites.time = types.SimpleNamespace(monotonic=lambda: clock[0])
class Case:
    def __init__(self, name): self.name = name
    def __str__(self): return self.name
    def measure(self, device): clock[0] += 4; return {}
with tempfile.TemporaryDirectory() as folder:
    sys.stdout, printed = sys.stderr, sys.stdout
    suites.run_cases("race", map(Case, "abcd"), torch.device("cpu"), pathlib.Path(folder), 11)
    sys.stdout = printed
    document = json.loads((pathlib.Path(folder) / "race.json").read_text())
assert [case["case"] for case in document["cases"]] == ["a", "b"]
assert document["skipped"] == [{"case": name, "why": "out of time"} for name in "cd"]
""",
    "each test of a kernel belongs to one process": """
from perf.gpu.calls import _shards
from tengrad_triton.kernels import SPECS
shards = _shards()
assert set(shards) == {*(spec.name for spec in SPECS), "others"}
assert shards["gram"] == "[gram- or [gram]" and "not ([gram_rows- or [gram_rows])" in shards["others"]
""",
    "a broken result file does not end the call": """
import json, pathlib, tempfile
import torch
from perf.gpu.boxes import Box
from perf.gpu.summary import MOST, Summary, shortened
box = Box("steps", 1, (), ("steps", "race"))
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "race.json").write_text('{"cases": [{}]}')
    summary = Summary("first", torch.device("cpu"), folder, "abc", [box])
    (folder / "steps.json").write_text('{"cases": [')
    for ended in ("stopped: out of time", "not run: no GPU", "failed with exit status 1"):
        summary.add(box, 1.0, 1.0, [{"task": "steps", "ended": ended, "seconds": 1.0}])
        assert summary.has_failures == ended.startswith("failed")
        lines = list(summary.lines(box))
        assert lines[1] == f"steps: {ended} after 1.0 s"
        assert lines[2].startswith("steps.json cannot be read: JSON")
        assert len(lines) == 3, "race.json is older than the call"
    document = json.loads((folder / "summary-first.json").read_text())
assert [box["box"] for box in document["boxes"]] == 3 * ["steps"]
assert list(shortened(["x" * MOST, "y", "z"])) == ["... 3 more lines: see the result files"]
assert list(shortened(["x", "y" * MOST, "z"])) == ["x", "... 2 more lines: see the result files"]
""",
    "the race's table says that a run came down again": """
from perf.gpu.page import parts
from perf.results import Device
curves = {"SGD": (60, 91, 93, 92), "TENGraD, default": (50, 92.5, 40.5, 70)}
cases = [
    {"optimizer": name, "seed": 0, "epochs": 2, "curve": [
        {"steps": 100 * at, "seconds": 0.25 * at, "accuracy": float(accuracy)} for at, accuracy in enumerate(curve, 1)
    ]} for name, curve in curves.items()
]
document = {"suite": "race", "machine_info": {"device_type": "cpu", "started": ""}, "cases": cases}
race = next(part for part in parts(Device("here", {"race": document})) if part.title == "A race by training time")
lines = {line[0]: dict(zip(race.titles, line, strict=True)) for line in race.lines}
percents = {name: [line[key] for key in ("best, %", "lowest after, %", "last, %")] for name, line in lines.items()}
assert percents == {"SGD": ["93.00", "92.00", "92.00"], "TENGraD, default": ["92.50", "40.50", "70.00"]}, percents
assert [line["ms a step"] for line in lines.values()] == ["2.5", "2.5"], lines
assert [line["s to SGD's best"] for line in lines.values()] == ["0.8", "–"], lines
""",
    "requests that cannot be carried out are one line": """
import contextlib, io, pathlib, sys, tempfile
import torch
from perf.gpu.__main__ import main
def said(*arguments):
    sys.argv, out, err = ["perf.gpu", *arguments], io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as status:
        assert status.code == 2, status.code
    else:
        raise AssertionError(f"it accepted {arguments}: {out.getvalue()}")
    return err.getvalue()
with tempfile.TemporaryDirectory() as folder:
    other = pathlib.Path(folder) / "other.npz"
    other.write_text("text")
    out = ["--out", f"{folder}/out"]
    if not torch.cuda.is_available():
        assert said("first", *out) == (
            "error: torch finds no GPU here: --rehearse runs all boxes on a CPU, at tiny sizes\\n")
    rehearsal = [*out, "--rehearse"]
    assert said("first", *rehearsal, "--only", "race") == (
        "error: --only race: the first call has right, trace, steps, kernels, variants\\n")
    assert said("first", *rehearsal, "--seconds", "0") == "error: --seconds must be positive, got 0\\n"
    for path in (other, pathlib.Path(folder) / "missing.npz"):
        line = said("second", *rehearsal, "--data", str(path))
        assert line.startswith(f"error: {path.resolve()}: no packed images (") and line.count("\\n") == 1, line
    assert "cannot be written" in said("first", "--rehearse", "--out", f"{other}/out")
    line = said("data", folder, f"{folder}/out.npz")
    assert line.startswith(f"error: {folder}: no test-*.parquet in it") and line.count("\\n") == 1, line
    assert "invalid choice: 'third'" in said("third", *out)
    sys.modules["datasets"] = None
    (pathlib.Path(folder) / "test-0.parquet").write_text("")
    assert said("data", folder, f"{folder}/out.npz").startswith("error: datasets is not installed: run pip install")
""",
}


@pytest.fixture(scope="module")
def errors():
    return errors_of(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds_that(check, errors):
    assert check not in errors, errors[check]
