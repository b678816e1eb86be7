"""`tengrad-triton paper` end to end on generated images: what it runs, measures, keeps, refuses and says."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from statistics import mean

import pytest
import torch
from dense import sample_gradients
from PIL import Image
from test_cli import one_line
from test_data import write_folder
from torch import nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.measuring.power_law import exponent
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.paper import estimates
from tengrad_triton.recipes.paper.measurements import complexity, inverses, phases
from tengrad_triton.recipes.paper.published import ROWS, chosen_rows
from tengrad_triton.recipes.paper.report import page
from tengrad_triton.recipes.paper.report.seeds import Finished, by_epoch, levels, times_to
from tengrad_triton.recipes.paper.request import OF_RUNS, TARGETS, Asked, Scale
from tengrad_triton.recipes.paper.runs import runs_of, settings_of
from tengrad_triton.recipes.training import loop as train
from tengrad_triton.recipes.training.settings import Settings

SMALL = ["--scale.width", "4", "--scale.batch-size", "16", "--scale.depth", "10"]
SMALL += ["--device", "cpu", "--threads", "1"]
NAMES = ("tengrad", "sgd", "kfac", "adamw")
CPU = torch.device("cpu")
BLOCKS = ("figure6", "figure7", "figure8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write 48 training and 24 test images of every data set."""
    folder, threads = tmp_path_factory.mktemp("data"), torch.get_num_threads()
    for name, columns in (
        ("fashion_mnist", ()),
        ("cifar10", ("img", "label", "RGB")),
        ("cifar100", ("img", "fine_label", "RGB")),
    ):
        (folder / name).mkdir()
        write_folder(folder / name, *columns, count=24, size=(8, 8))
    yield folder
    torch.set_num_threads(threads)


def arguments(data, out, *words, epochs=2):
    return ["paper", *words, *SMALL, "--scale.epochs", str(epochs), "--data", str(data), "--out", str(out)]


def run(data, out, *words, epochs=2):
    return main(arguments(data, out, *words, epochs=epochs))


def outcomes(out, kind="runs"):
    return {file.parent.name: json.loads(file.read_text()) for file in sorted((out / kind).rglob("outcome.json"))}


def table_after(line, text):
    """Return the cells of the first table after a line, by the first cell of each row."""
    lines = re.search(r"(?:^\|.*\|\n)+", text[text.index(line) :], re.MULTILINE).group().splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


# -- a whole small report --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Make one report with everything that is measured beside the runs."""
    out = tmp_path_factory.mktemp("paper") / "out"
    words = ["table2", *BLOCKS, "figure9", "table1", "phases", "--row", "3C1F", "--seeds", "2"]
    grid = ["--grid.lr", "0.003", "1e30", "--grid.damping", "0.1", "0.3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverses, "ENTRIES", 48)
        patch.setattr(complexity, "BASE", {"batch": 16, "width": 16, "depth": 2})
        patch.setattr(complexity, "VALUES", {"batch": (16, 32), "width": (8, 16), "depth": (1, 2)})
        assert run(data, out, *words, "--optimizer", *NAMES, *grid) == 0
    return out


def test_a_run_is_one_optimizer_from_one_seed(whole):
    assert set(outcomes(whole)) == {f"{name}-seed{seed}" for name in NAMES for seed in (0, 1)}
    for outcome in outcomes(whole).values():
        assert [row["epoch"] for row in outcome["rows"]] == [1, 2]
        assert all(row["train_seconds"] > 0 < row["cpu_seconds"] for row in outcome["rows"])
    assert not list(whole.rglob("*.pt"))  # a finished run needs no checkpoint
    assert not list(whole.rglob("*.tmp"))


def test_the_papers_numbers_stand_beside_ours(whole):
    text = (whole / "paper.md").read_text()
    table = table_after("## Table 2: 3C1F, Fashion-MNIST", text)
    assert list(table) == ["tengrad", "sgd", "kfac", "adamw"]
    assert [table[name][:2] for name in NAMES] == [
        ["93.15 %", "43 s"],
        ["92.60 %", "52 s"],
        ["92.20 %", "188 s"],
        ["-", "-"],
    ]
    for name in NAMES:
        tops = [
            max(100 * row["test_accuracy"] for row in outcome["rows"])
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
        (name, quantity) for name in ("tengrad", "kfac") for quantity in ("batch", "width", "depth")
    }
    for cost in ("curvature", "step"):  # a difference of times may be negative at such sizes: there is no exponent then
        fits = [case["exponents"].get(cost) for case in costs if case["optimizer"] == "kfac"]
        cells = table_after("## Table 1:", text)[f"kfac, {cost}"]
        assert cells[1:] == ["-" if fit is None else f"{fit:.2f}" for fit in fits]
    seconds = json.loads((whole / "results/phases.json").read_text())["seconds"]
    assert set(seconds) == set(NAMES)
    for name in ("tengrad", "kfac"):
        assert seconds[name]["refresh"]["curvature"] > 0 == seconds[name]["reuse"]["curvature"]
        assert min(seconds[name]["reuse"][part] for part in ("forward and backward", "solve", "update")) > 0
    assert set(seconds["adamw"]) == {"reuse"}
    assert seconds["adamw"]["reuse"]["update"] > 0


def test_an_optimizer_that_is_made_of_others_is_counted_once():
    job = train.Job(
        Settings(model="mlp", width=5, batch_size=6), train_split(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), 3), CPU
    )
    parts = phases.measured(job, "muon")["reuse"]
    assert parts["forward and backward"] > 0
    assert parts["update"] > 0


def test_peaks_are_measured_in_processes_of_their_own(data, tmp_path):
    assert run(data, tmp_path / "out", "memory", "--optimizer", "sgd", "tengrad") == 0
    peaks = json.loads((tmp_path / "out/results/memory.json").read_text())["bytes"]
    table = table_after("## Peak memory", (tmp_path / "out/paper.md").read_text())
    assert table["sgd"] == [f"{peaks['sgd'] / 2**20:.0f}", "1.00"]
    assert table["tengrad"] == [f"{peaks['tengrad'] / 2**20:.0f}", f"{peaks['tengrad'] / peaks['sgd']:.2f}"]


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
    assert len(files) == 4 + len(BLOCKS) + 2 + 2  # a row's quantities, blocks, sensitivity, table 1 and phases
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
    assert run(data, whole, "table2", "--row", "3C1F", "--seeds", "2", "--optimizer", *NAMES) == 0
    assert "8 runs, 0 of them to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in whole.rglob("outcome.json")}


def test_another_scale_needs_another_folder(whole, data, capsys):
    words = ["table2", "--row", "3C1F", "--optimizer", "sgd", "--seeds", "1", "--scale.train-images", "20"]
    assert run(data, whole, *words) == 2
    assert "was run with another train_limit" in one_line(capsys)
    assert run(data, whole, "figure6", "--scale.train-images", "20") == 2
    assert "was measured at another scale" in one_line(capsys)


# -- every target ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every(data, tmp_path_factory):
    """Train SGD on every row for an epoch."""
    out = tmp_path_factory.mktemp("every") / "out"
    assert run(data, out, *OF_RUNS, "--seeds", "1", "--optimizer", "sgd", epochs=1) == 0
    return out


@pytest.mark.parametrize("target", OF_RUNS)
def test_every_target_of_runs_gets_its_figures(target, every):
    text = (every / "paper.md").read_text()
    asked = Asked(seeds=1, optimizer=("sgd",))
    assert {run.row.key for run in runs_of(asked, (target,))} == {row.key for row in OF_RUNS[target][1]}
    for row in OF_RUNS[target][1]:
        assert (every / "runs" / row.key / "sgd-seed0" / "outcome.json").exists()
        assert table_after(f"## Table 2: {row.title}", text)["sgd"][0] == f"{row.reported['sgd'][1]:.2f} %"
        shown = [
            q for q in ("train_loss", "train_accuracy", "test_accuracy") if target in page.figures_of(row.title, q)
        ]
        assert shown or target == "table2"
        for quantity in shown:
            assert (every / f"figures/paper-{row.key}-{quantity}.png").exists()


@pytest.mark.parametrize("target", ["figure10", "tables3-5"])
def test_searches_try_every_point(target, data, tmp_path):
    grid = ["--grid.lr", "0.003", "0.01", "--grid.weight-decay", "0.001", "--grid.damping", "0.1"]
    words = ["--seeds", "1", "--row", "3C1F", "--optimizer", "tengrad", "sgd"]
    assert run(data, tmp_path / "out", target, *words, *grid, epochs=1) == 0
    names = ["tengrad"] if target == "figure10" else ["tengrad", "sgd"]
    labels = {f"{name}-{lr}-0.001{'-0.1' * (name != 'sgd')}-seed0" for name in names for lr in (0.003, 0.01)}
    assert set(outcomes(tmp_path / "out", "grid")) == labels
    table = table_after("Learning rate, weight decay", (tmp_path / "out/paper.md").read_text())
    assert table["3C1F, Fashion-MNIST"][-1] == "0 of 2"


CHOICES = {
    ("3c1f",): [0],
    ("WideResNet",): [1, 2],
    ("wideresnet, cifar-10",): [1],
    ("wrn-28-4-cifar10", "3C1F"): [1, 0],
    ("MobileNetV2", "mobilenetv2-cifar10"): [5, 6],
}


@pytest.mark.parametrize("words", CHOICES, ids=str)
def test_rows_are_chosen_by_their_names_or_by_how_these_begin(words):
    assert chosen_rows(words) == tuple(ROWS[index] for index in CHOICES[words])


def test_all_is_every_target_and_the_papers_own_scale_is_the_default():
    runs = runs_of(Asked(), TARGETS)
    table2 = [run for run in runs if not run.grid]
    assert len(table2) == len(ROWS) * 8 * 5
    first = table2[0].settings
    assert (first.model, first.width, first.epochs, first.batch_size) == ("3c1f", 128, 10, 128)
    assert (first.tengrad.lr, first.tengrad.weight_decay, first.tengrad.damping) == (0.003, 0.001, 0.1)
    assert len({(run.row.key, run.label) for run in runs}) == len(runs)
    grid = [run for run in runs if run.grid and run.row is ROWS[0] and run.name == "kfac"]
    assert len(grid) == 6 * 6 * 7 * 5


@pytest.mark.parametrize(
    ("row", "epochs", "decay_at", "decay"),
    [(1, None, (10, 20, 30, 40, 50), 0.5), (1, 6, (1, 2, 3, 4, 5), 0.5), (2, None, (30, 45), 0.1), (2, 4, (2, 3), 0.1)],
)
def test_rates_decay_as_in_the_paper_in_proportion_to_the_epochs(row, epochs, decay_at, decay):
    settings = settings_of(ROWS[row], "sgd", 0, Asked(scale=Scale(epochs=epochs)), ROWS[row].of("sgd"))
    assert (settings.decay_at, settings.decay) == (decay_at, decay)


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_a_kill_loses_no_finished_run_and_at_most_the_current_epoch(data, tmp_path):
    words = ["table2", "--row", "3C1F", "--seeds", "1", "--optimizer", "sgd", "adamw"]
    asked = arguments(data, tmp_path / "out", *words, epochs=40)
    command = [
        sys.executable,
        "-c",
        "import sys; from tengrad_triton.recipes.cli.main import main; sys.exit(main())",
        *asked,
    ]
    folders = [tmp_path / "out/runs" / ROWS[0].key / f"{name}-seed0" for name in ("sgd", "adamw")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (folders[1] / "metrics.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = json.loads((folders[1] / "metrics.json").read_text())
    finished = (folders[0] / "outcome.json").stat().st_mtime_ns
    assert main(asked) == 0
    assert (folders[0] / "outcome.json").stat().st_mtime_ns == finished
    rows = json.loads((folders[1] / "outcome.json").read_text())["rows"]
    assert len(rows) == 40
    assert rows[: len(before)] == before  # with the seconds of before
    assert len(json.loads((folders[1] / "machine.json").read_text())) == 2


def test_ctrl_c_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "one_step", interrupted)
    assert run(data, tmp_path / "out", "table2", "--row", "3C1F", "--optimizer", "sgd") == 130
    assert "give the same command again" in one_line(capsys)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(data, tmp_path, monkeypatch, capsys):
    words = ["table2", "--row", "3C1F", "--optimizer", "sgd", "--seeds", "1"]
    saved, written = torch.save, []

    def full(*arguments):
        written.append(1)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run(data, tmp_path / "out", *words) == 2
    assert "No space left on device): make room, and give the same command again" in one_line(capsys)
    assert run(data, tmp_path / "out", *words) == 0
    (outcome,) = outcomes(tmp_path / "out").values()
    assert len(outcome["rows"]) == 2


# -- what is refused, and estimates ----------------------------------------------------------------------------------

MISTAKES = {
    "target": (["table9"], "'table9' is not known: choose from table2, figure1"),
    "a drawing": (["figure2"], "figure2 is a drawing of the methods: there is nothing to run"),
    "no target": ([], "no target: name one or several of table2"),
    "row": (
        ["table2", "--row", "VGG"],
        "--row VGG: no such row: choose from 3C1F, Fashion-MNIST; WideResNet, CIFAR-10",
    ),
    "row of another figure": (["figure12", "--row", "3C1F"], "figure12 shows WideResNet, CIFAR-10"),
    "optimizer": (["table2", "--optimizer", "adam"], '"tengrad", "sgd"'),
    "optimizer twice": (["table2", "--optimizer", "sgd", "sgd"], "once"),
    "scale": (["table2", "--scale.epochs", "0"], "--scale.epochs"),
    "no data": (["table2", "--data", "."], "no folder fashion-mnist in it"),
    "missing package": (["table2", "--optimizer", "soap"], "pip install 'tengrad-triton[rivals]'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert main(["paper", *arguments]) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_stands_before_the_runs_and_leaves_nothing(data, tmp_path, capsys):
    words = ["table2", "--row", "3C1F", "--seeds", "3", "--optimizer", "sgd", "tengrad", "--estimate"]
    assert run(data, tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    assert "6 runs, 6 of them to do; scale: epochs 2" in shown
    assert "estimated from first steps" in shown
    (sgd,) = [line.split() for line in shown.splitlines() if " sgd " in line]
    assert sgd[3:5] == ["3", "6"]  # runs; two epochs of three steps
    assert not (tmp_path / "out").exists()


def test_an_estimate_is_of_steps_and_evaluations():
    assert estimates.Estimate(step=0.5, steps=20, evaluations=3.0).seconds == 13.0


def test_what_does_not_fit_the_memory_is_refused_with_the_estimate(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimates, "free_bytes", lambda _: 1000)
    assert run(data, tmp_path / "out", "table2", "--row", "3C1F", "--optimizer", "tengrad") == 2
    assert re.search(r"tengrad on 3c1f needs at least \d+\.\d GiB at 16 images a step, and 0\.0 GiB", one_line(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sgd", "tengrad", "kfac", "ekfac"])
def test_the_least_memory_is_counted_by_hand(name):
    """An mlp of width 5 on 2 x 2 pixels: layers 4 to 5, 5 to 5 and 5 to 3; every layer's output is kept."""
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    split = train_split(images, 3)
    job = train.Job(Settings(model="mlp", width=5, batch_size=6), split, CPU)
    parameters, kept = (4 * 5 + 5) + (5 * 5 + 5) + (5 * 3 + 3), 4 + 5 + 5 + 5 + 5 + 3
    sizes = [(4, 5), (5, 5), (5, 3)]
    factors = sum(i**2 + o**2 for i, o in sizes)
    curvature = {
        "sgd": 0,
        "tengrad": sum(6 * min(i * o, i + o) + 6**2 for i, o in sizes),
        "kfac": factors,
        "ekfac": factors + sum(i * o for i, o in sizes),
    }[name]
    assert estimates.needed_bytes(job, name) == 4 * (3 * parameters + 6 * kept + curvature)


def train_split(images, classes):
    from tengrad_triton.recipes.data.images import Data, Normalizer, Split

    split = Split(images, torch.arange(len(images)) % classes)
    return Data(split, split, Normalizer.of(split), classes)


# -- the numbers -----------------------------------------------------------------------------------------------------


def finished(accuracies, seconds, diverged=False):
    rows = [
        {"test_accuracy": a, "train_seconds": s, "train_loss": 1 - a} for a, s in zip(accuracies, seconds, strict=True)
    ]
    return Finished("sgd", 0, rows, diverged, {}, "train_seconds")


def test_times_are_to_the_first_epoch_that_reaches_an_accuracy():
    run = finished([0.5, 0.8, 0.7, 0.8], [1.0, 2.0, 3.0, 4.0])
    assert run.top() == (80.0, 3.0)
    assert [run.time_to(level) for level in (50, 50.1, 81)] == [1.0, 3.0, None]
    other = finished([0.5, 0.6], [2.0, 2.0])
    spread, reached = times_to([run, other], 60)
    assert (spread.mean, spread.count, reached) == (3.5, 2, 2)
    assert times_to([run, other], 70)[1] == 1
    assert times_to([other], 70) == (None, 0)


def test_curves_end_where_the_shortest_run_does():
    spreads, seconds = by_epoch([finished([0.5, 0.75], [1, 2]), finished([0.25], [2])], "test_accuracy", 100)
    assert [(s.mean, s.count) for s in spreads] == [(37.5, 2)]
    assert spreads[0].std == pytest.approx(25 / 2**0.5)
    assert seconds == [1.5]


def test_fixed_accuracies_are_those_that_every_run_of_some_optimizer_reaches():
    groups = {"sgd": [finished([0.85], [1]), finished([0.83], [1])], "adamw": [finished([0.95], [1], diverged=True)]}
    assert levels(groups) == [70, 75, 80, 82]


@pytest.mark.parametrize("power", [-1.0, 0.5, 3.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert exponent([2, 5, 11], [3 * v**power for v in (2, 5, 11)]) == pytest.approx(power)


@pytest.mark.parametrize(("method", "network"), [("exact NGD", True), ("TENGraD", False)])
def test_a_block_of_the_inverse_is_the_dense_one(method, network):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, damping = torch.randn(7, 3, dtype=torch.float64), 0.1
    p_NC = model(x).softmax(1).detach()
    rows = []
    for label in range(3):
        grads = sample_gradients(model, x, torch.full((7,), label), cross_entropy)
        names = grads if network else ["0.weight", "0.bias"]
        rows.append(p_NC[:, label, None].sqrt() * torch.cat([grads[name].flatten(1) for name in names], 1))
    j_RK = torch.cat(rows)
    fisher_KK = j_RK.mT @ j_RK / 7
    dense_KK = torch.linalg.inv(fisher_KK + damping * torch.eye(len(fisher_KK), dtype=torch.float64))
    block = inverses.inverse_block(inverses.METHODS[method], model, 0, (x, torch.arange(7) % 3), damping)
    torch.testing.assert_close(block, damping * dense_KK[:12, :12], rtol=1e-9, atol=1e-12)


def test_distances_are_those_of_the_definitions():
    exact, other = torch.diag(torch.tensor([0.5, 1.0])), torch.diag(torch.tensor([0.5, 0.0]))
    found = inverses.distances({"exact NGD": exact, "other": other, "none": torch.eye(2)})
    assert found["other"] == pytest.approx({"relative": 1 / 1.25**0.5, "of curvature": 2, "cosine": 0.5 / 1.25**0.5})
    assert found["none"] == pytest.approx({"relative": 0.5 / 1.25**0.5, "of curvature": 1, "cosine": None})
    flat = inverses.distances({"exact NGD": torch.eye(2), "other": other})["other"]
    assert (flat["of curvature"], flat["cosine"]) == (None, None)


def test_shown_entries_are_spread_over_the_weight():
    small = inverses.shown_entries(torch.empty(4, 2, 3, 3))
    assert torch.equal(small, torch.arange(72))
    large = inverses.shown_entries(torch.empty(500, 648))
    assert (len(large), large[0].item(), large[-1].item()) == (24 * 24, 0, 500 * 648 - 1)
    assert len(large.unique()) == len(large)


def test_rows_have_models_and_every_paper_optimizer_is_tuned():
    for row in ROWS:
        assert image_model(row.model).width == (32 if row.model == "3c1f" else row.width)
        assert set(row.tuned) == set(row.reported) == {"sgd", "tengrad", "kfac", "ekfac", "kbfgs"}
        for name, tuned in row.tuned.items():
            settings = row.of(name)
            assert [settings.lr, settings.weight_decay, *([settings.damping] if len(tuned) > 2 else [])] == list(tuned)
    assert (ROWS[0].of("kbfgsl").lr, ROWS[0].of("adamw").lr) == (0.03, 1e-3)
