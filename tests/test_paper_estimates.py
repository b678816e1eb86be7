"""`tengrad-triton paper --estimate`: time and memory of every target, without a trace, and mistakes before any work."""

import json
import re
import shutil
import tempfile
from datetime import datetime
from io import StringIO

import pytest
import torch
from helpers.commands import one_line
from helpers.paper import figures_not_rendered, run
from rich.console import Console

from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.paper import estimates, execute, forecast, memory
from tengrad_triton.recipes.paper.measurements import complexity, costs, inverses, measure, peaks, phases
from tengrad_triton.recipes.paper.progress import telling
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.paper.request import MODELS_OF_FIGURES, Request, Scale
from tengrad_triton.recipes.paper.runs import runs_of
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.paper.table import Row, duration, table_of
from tengrad_triton.recipes.training import loop, peak_memory, warm_up

CPU = torch.device("cpu")
NAMES = ("sgd", "tengrad_paper", "tengrad", "kfac")
GRID = ["--grid.lr", "0.01", "--grid.damping", "0.1", "--grid.weight-decay", "0.001"]
SMALL = {"batch": 8, "width": 6, "depth": 2}
START = 7.0  # seconds in which a process starts


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch):
    """Make the cells of table 1 and the blocks of the inverse small, and start no process for the memory."""
    monkeypatch.setattr(inverses, "ENTRIES", 12)
    monkeypatch.setattr(inverses, "OUTPUTS", 3)
    monkeypatch.setattr(complexity, "BASE", SMALL)
    monkeypatch.setattr(
        complexity, "ANCHORS", {"base": SMALL, "width": {**SMALL, "width": 12}, "batch": {**SMALL, "batch": 16}}
    )
    monkeypatch.setattr(complexity, "VALUES", {"batch": (8, 16), "width": (6, 12), "depth": (2, 3)})
    monkeypatch.setattr(peaks, "seconds_to_start", lambda: START)


def tree(folder):
    """Return every path below a folder, with a file's content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# For each target the rows of its estimate: what, and how many runs of each optimizer.
ROWS = {
    "table2": {EXPERIMENTS[0].title: 2},
    "figure4": {EXPERIMENTS[0].title: 2},
    "figure9": {EXPERIMENTS[0].title: 2},
    "tables3-5": {EXPERIMENTS[0].title: 2},
    "figure6": {"for figures 6 to 8": 1, "figure6": None},
    "figure8": {"for figures 6 to 8": 1, "figure8": None},
    "table1": {"table1": None},
    "phases": {"phases": None},
    "memory": {"memory": None},
}


@pytest.mark.parametrize("target", ROWS)
def test_every_target_is_estimated_in_80_columns_and_leaves_no_trace(target, data, tmp_path, monkeypatch, capfd):
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("COLUMNS", "80")
    before = tree(tmp_path)
    words = [target, "--row", "3C1F", "--seeds", "2", "--optimizer", "tengrad_paper", *GRID, "--estimate"]
    assert run(tmp_path / "data", tmp_path / "out", *words) == 0
    shown = capfd.readouterr()
    assert not shown.err  # of torch's profiler neither
    assert re.search(r"^pieces to measure: \d+; at the paper's scale on a CPU each can take minutes$", shown.out, re.M)
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rule = next(number for number, line in enumerate(lines) if line.startswith("──"))
    rows = lines[rule + 1 : rule + 1 + len(ROWS[target])]
    for line, (what, runs) in zip(rows, ROWS[target].items(), strict=True):
        assert line.startswith(what)
        assert re.search(r" [\d.]+ s +\d+ MiB$", line)
        assert runs is None or re.search(rf" (tengrad_paper|sgd) +{runs} ", line)
    assert re.search(r"estimated: [\d.]+ s in all; begun now, it ends at \d\d:\d\d", " ".join(lines[-2:]))
    assert tree(tmp_path) == before


@pytest.fixture
def ticks(monkeypatch):
    """Let every step take a second of a clock, and nothing else any time."""
    passed = [0.0]

    def of(function, seconds=lambda *_: 1.0):
        def slower(*arguments):
            passed[0] += seconds(*arguments)
            return function(*arguments)

        return slower

    step = of(loop.one_step)
    for module in (loop, phases):
        monkeypatch.setattr(module, "one_step", step)
    monkeypatch.setattr(inverses, "_step_along", of(inverses._step_along))
    by_shape = of(complexity._two_steps, lambda model, _, x, *__: len(model) // 2 * x.shape[0] * x.shape[1])
    monkeypatch.setattr(complexity, "_two_steps", by_shape)
    monkeypatch.setattr(measure, "peak", of(peak_memory.peak_of_steps, lambda *_: START))
    for module in (warm_up, inverses, phases, complexity):
        monkeypatch.setattr(module, "now", lambda _: passed[0])
    return passed


@pytest.mark.parametrize(
    "targets", [("table2",), ("figure9",), ("figure6", "figure7"), ("table1",), ("phases",), ("memory",)]
)
def test_an_estimate_is_what_the_work_takes(targets, data, tmp_path, ticks):
    """Evaluations and the refreshes' share are models: a tenth of the time at most."""
    scale = Scale(epochs=3, width=4, batch_size=4)
    request = Request(row=("3C1F",), optimizer=NAMES, seeds=1, scale=scale, data=data, out=tmp_path, device="cpu")
    shared = Shared(request, Console(quiet=True), CPU)
    left = forecast.Left(runs_of(request, targets)[:3], measure.unmeasured(targets, request))
    estimated = sum(row.seconds for row in forecast.forecast(left, shared))
    before = ticks[0]
    for one in left.runs:
        execute.train(one, shared)
    with figures_not_rendered():
        measure.measure(left.measurements, shared)
    assert estimated == pytest.approx(ticks[0] - before, rel=0.2)


@pytest.mark.parametrize("target", ["table2", "figure10", "figure6", "figure7", "table1", "phases", "memory"])
def test_what_does_not_fit_the_memory_is_refused_before_anything_is_measured(
    target, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(forecast, "take_all", lambda *_: pytest.fail("measured"))
    for more in (["--estimate"], []):
        words = [target, "--row", "3C1F", "--optimizer", "tengrad_paper", *GRID, *more]
        assert run(data, tmp_path / "out", *words) == 2
        assert re.search(r"needs at least \d+ MiB, and 0 MiB are free: (lower --scale|name fewer)", one_line(capsys))
        assert not (tmp_path / "out").exists()


def empty(data, folder):
    folder.mkdir()


def another(data, folder):
    shutil.copytree(data / "cifar10", folder / "fashion_mnist")


def without_train(data, folder):
    shutil.copytree(data / "fashion_mnist", folder / "fashion_mnist")
    for file in (folder / "fashion_mnist").glob("train-*"):
        file.unlink()


WRONG = {empty: "fashion-mnist", another: "fashion", without_train: "train-"}


@pytest.mark.parametrize("target", ["table2", "figure10", "figure6", "table1", "phases", "memory"])
@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_wrong_data_are_refused_before_anything_is_measured(make, target, data, tmp_path, monkeypatch, capsys):
    make(data, tmp_path / "wrong")
    monkeypatch.setattr(forecast, "take_all", lambda *_: pytest.fail("measured"))
    for more in (["--estimate"], []):
        assert run(tmp_path / "wrong", tmp_path / "out", target, "--row", "3C1F", "--optimizer", "sgd", *more) == 2
        assert WRONG[make] in one_line(capsys)


def test_what_is_done_is_not_estimated_again(data, tmp_path, capsys):
    words = ["table2", "memory", "--row", "3C1F", "--seeds", "1", "--optimizer", "sgd"]
    with figures_not_rendered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak", lambda _: 1)
        assert run(data, tmp_path / "out", *words) == 0
    capsys.readouterr()
    before = tree(tmp_path / "out")
    assert run(data, tmp_path / "out", "phases", *words, "adamw", "--estimate") == 0
    shown = capsys.readouterr().out
    assert "has 1 of 2 runs, memory already" in " ".join(shown.split())
    assert "to do: 1 of 2 runs, phases; scale: epochs 2" in shown
    assert not re.search(r"^3C1F, Fashion-MNIST +sgd ", shown, re.M)
    assert re.search(r"^3C1F, Fashion-MNIST +adamw +1 ", shown, re.M)
    assert run(data, tmp_path / "out", *words, "--estimate") == 0
    assert "to do: nothing" in capsys.readouterr().out
    assert run(data, tmp_path / "new", *words, "--estimate") == 0
    assert "to do: 1 of 1 run, memory; " in capsys.readouterr().out
    assert run(data, tmp_path / "out", *words, "--estimate", epochs=1) == 2
    assert "name another --out" in one_line(capsys)
    assert tree(tmp_path / "out") == before


def test_only_the_epochs_that_a_run_lacks_count(tmp_path, data):
    request = Request(row=("3C1F",), optimizer=("sgd",), seeds=1, scale=Scale(epochs=5), data=data, out=tmp_path)
    (one,) = runs_of(request, ("table2",))
    assert one.epochs_left(tmp_path) == 5
    one.folder(tmp_path).mkdir(parents=True)
    (one.folder(tmp_path) / "metrics.json").write_text(json.dumps([{"epoch": 1}, {"epoch": 2}]))
    assert one.epochs_left(tmp_path) == 3


# Two steps to warm up and three with 2 of the 16 images; then two and five with all, or three with 4.
@pytest.mark.parametrize(("slow", "images"), [(1e9, 5 * 2 + 7 * 16), (0.0, 5 * 2 + 3 * 4)], ids=["quick", "slow"])
def test_slow_steps_are_measured_with_fewer_images(slow, images, data, tmp_path, monkeypatch):
    """A step takes a second for each image, and four more."""
    passed, seen = [0.0], []

    def one_step(model, optimizer, batch, *_):
        seen.append(len(batch))
        passed[0] += len(batch) + 4

    monkeypatch.setattr(estimates, "SLOW", slow)
    monkeypatch.setattr(loop, "one_step", one_step)
    monkeypatch.setattr(warm_up, "now", lambda _: passed[0])
    scale = Scale(width=4, batch_size=16)
    request = Request(row=("3C1F",), optimizer=("tengrad",), seeds=1, scale=scale, data=data, out=tmp_path)
    (one,) = runs_of(request, ("table2",))
    times = estimates.step_times(Shared(request, Console(quiet=True), CPU).job(one.settings), "tengrad")
    assert (times.plain, times.refresh) == (20.0, 0.0)
    assert sum(seen) == images


# By optimizer and steps: how many of the steps refresh the curvature.
REFRESHES = {("sgd", 10): 0, ("tengrad_paper", 100): 1, ("kfac", 101): 2, ("tengrad", 63): 12, ("tengrad", 64): 13}


@pytest.mark.parametrize(("name", "steps"), REFRESHES, ids=str)
def test_each_refresh_counts(name, steps):
    times = estimates.StepTimes(2.0, 3.0, OPTIMIZERS[name]().changed(refresh_every=100))
    assert times.seconds(steps) == 2 * steps + 3 * REFRESHES[name, steps]


# With costs of 1, 4 and 3 s at the base, at twice its width and at twice its batch; six rounds of four layers.
CELLS = {
    (8, 6, 2): 6.0,
    (16, 6, 2): 18.0,
    (12, 6, 2): 12.0,
    (8, 12, 2): 24.0,
    (8, 3, 2): 1.5,
    (8, 24, 2): 24.0 * 8,
    (8, 6, 5): 12.0,
}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_of_table1_follows_from_three(cell):
    batch, width, depth = cell
    anchors = {"base": 1.0, "width": 4.0, "batch": 3.0}
    sizes = {"batch": batch, "width": width, "depth": depth}
    assert complexity.seconds_of_cell(anchors, sizes) == pytest.approx(CELLS[cell])


def test_a_network_of_all_classes_needs_their_output_gradients_and_rows():
    """A layer of 4 inputs and 3 outputs, and 5 samples of 3 classes: 15 rows of 7 numbers, which are fewer than 12."""
    sizes = memory.sizes_of(lambda: torch.nn.Sequential(torch.nn.Linear(4, 3)), (4,))
    numbers = 3 * 15 + 5 * 3 + 15 * 3 + 15 * 7 + 15**2
    assert memory.bytes_of_all_classes(sizes, 5, 3) == 4 * numbers


@pytest.mark.parametrize("target", [*costs.COSTS])
def test_each_piece_is_told_in_a_pipe(target, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "peak", lambda _: 1)
    with figures_not_rendered():
        words = [target, "--optimizer", "tengrad_paper", "sgd"]
        assert run(data, tmp_path / "out", *words, epochs=1) == 0
    lines = capsys.readouterr().out.splitlines()
    for what in ("estimating", "measuring"):
        told = [line.split(":")[0] for line in lines if line.startswith(what)]
        assert told == [f"{what} {number} of {len(told)}" for number in range(1, len(told) + 1)]
        assert told


def test_a_terminal_shows_the_piece_and_a_clock():
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with telling(console, "measuring", 2) as tell:
        tell("a")
        tell("[b]")
    shown = written.getvalue()
    assert "measuring 2 of 2: [b]" in shown
    assert "0:00:00" in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_cell_is_cut(width):
    names = [e.title for e in EXPERIMENTS if e.model in MODELS_OF_FIGURES]
    rows = [Row(name, "tengrad_unscaled", 1000, 7e5, 7e8, 2**40) for name in names]
    written = StringIO()
    Console(file=written, width=width).print(table_of(rows, datetime(2026, 1, 1)))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    for word in ("tengrad_unscaled", "1000", "8.1 days", "8101.9 days", "1024.0 GiB", "2159-02-04", *names[0].split()):
        assert word in words


DURATIONS = {
    0.04: "0.0 s",
    9.9: "9.9 s",
    119: "119 s",
    121: "2.0 min",
    7201: "2.0 h",
    36000: "10 h",
    864000: "10.0 days",
}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_durations(seconds):
    assert duration(seconds) == DURATIONS[seconds]
