"""`tengrad-triton report`: the page says what the run's files say, and nothing of where they lie."""

import csv
import json
import math
import re
import shlex
import shutil
from statistics import median

import pytest
import torch
from helpers.commands import SMALL, one_line, threads_restored
from helpers.image_files import write_folder
from helpers.pages import table_after
from matplotlib.figure import Figure
from PIL import Image

from tengrad_triton.recipes.cli import commands
from tengrad_triton.recipes.cli import report as command
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.reports.run_figures import FIGURES, draw, running_mean
from tengrad_triton.recipes.reports.run_page import GENERATED, GPU_NOTE
from tengrad_triton.recipes.reports.styles import log_axis
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record, Steps
from tengrad_triton.recipes.training.settings import Settings

NAMES = Settings().optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train every optimizer for two epochs of three steps on local data, which are then deleted."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    write_folder(folder / "data", count=80)
    local = ["--dataset", "fashion-mnist", "--data", str(folder / "data")]
    with threads_restored():
        assert main(["train", *SMALL, *local, "--epochs", "2", "--seed", "3", "--out", str(folder / "run")]) == 0
    shutil.rmtree(folder / "data")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Give a copy of the run, which a test may damage."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))


def page_of(run):
    file = run.parent / "docs/small run.md"
    assert main(["report", str(run), "--to", str(file)]) == 0
    return file.read_text()


@pytest.fixture
def text_of(monkeypatch):
    """Give `page_of` without the figures, for tests that look at the text only."""
    monkeypatch.setattr(command, "draw", lambda *_: None)
    return page_of


@pytest.fixture(scope="module")
def page(trained):
    """Write the page of the whole run, once for the tests that only read it."""
    return page_of(trained)


def edited(run, name, change):
    content = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(change(content)))


def test_the_outcome_is_that_of_the_metrics(trained, page):
    table = table_after("# 3c1f, width 4, on 150 images of fashion-mnist", page)
    rows = json.loads((trained / "metrics.json").read_text())
    seconds = {name: [row["train_seconds"] for row in rows if row["optimizer"] == name] for name in NAMES}
    assert list(table) == list(NAMES)
    for name, cells in table.items():
        first, last = (row for row in rows if row["optimizer"] == name)
        best = max((first, last), key=lambda row: row["test_accuracy"])
        assert cells == [
            f"{last['test_accuracy']:.2%}",
            f"{best['test_accuracy']:.2%} ({best['epoch']})",
            f"{last['train_loss']:.4f}",
            f"{sum(seconds[name]):.1f} s",
            f"{median(seconds[name]):.2f} s",
            f"{median(seconds[name]) / median(seconds['sgd']):.2f}",
        ]


def test_the_times_of_steps_are_those_of_the_csv(trained, page):
    """Of six steps tengrad_paper refreshes at two, 0 and 4; tengrad refreshes at all."""
    table = table_after("## Time of a step", page)
    with (trained / "steps.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    ends = {name: [float(line["train_seconds"]) for line in lines if line["optimizer"] == name] for name in NAMES}
    times = {name: [end - start for start, end in zip([0, *of], of, strict=False)] for name, of in ends.items()}
    times["tengrad_paper, refresh"] = times["tengrad_paper"][::4]
    times["tengrad_paper, reuse"] = [time for step, time in enumerate(times["tengrad_paper"]) if step % 4]
    assert set(table) == set(times)
    for label, (number, typical, ratio) in table.items():
        assert number == str(len(times[label]))
        assert float(typical.removesuffix(" ms")) == pytest.approx(1e3 * median(times[label]), abs=0.006)
        assert float(ratio) == pytest.approx(median(times[label]) / median(times["sgd"]), abs=0.006)


def test_without_sgd_there_is_no_ratio(run, text_of):
    edited(run, "metrics.json", lambda rows: [row for row in rows if row["optimizer"] != "sgd"])
    edited(run, "settings.json", lambda settings: settings | {"optimizer": ["tengrad", "adamw"]})
    lines = (run / "steps.csv").read_text().splitlines()
    (run / "steps.csv").write_text("".join(f"{line}\n" for line in lines if not line.startswith("sgd")))
    page = text_of(run)
    for heading in ("of fashion-mnist", "## Time of a step"):
        assert {cells[-1] for cells in table_after(heading, page).values()} == {"-"}
    assert "--sgd" not in page


def test_times_of_steps_are_left_out_on_a_gpu(run, text_of):
    edited(run, "machine.json", lambda sessions: [session | {"device_type": "cuda"} for session in sessions])
    page = text_of(run)
    assert GPU_NOTE in page
    assert "refresh |" not in page
    assert " ms " not in page


def test_the_command_on_the_page_asks_for_the_same_run(trained, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"```bash\n(.*?)\n```", page, re.DOTALL)
    name, *arguments = shlex.split(command.replace("\\\n", ""))  # as a shell reads it
    (tmp_path / "DIR").mkdir()
    asked = commands.parse(arguments).settings.as_json()
    stored = json.loads((trained / "settings.json").read_text())
    assert name == "tengrad-triton"
    assert asked.pop("data") == str(tmp_path / "DIR")
    assert asked == {key: value for key, value in stored.items() if key != "data"}


def test_the_page_names_the_run_and_the_machine(trained, page):
    (session,) = json.loads((trained / "machine.json").read_text())
    for text in (
        "- batch: 64 images",
        "- epochs: 2",
        "- seed: 3",
        "refresh_every 4",
        "150 images to train with and 50",
    ):
        assert text in page
    machine = table_after("## Where", page)
    for key in ("device", "cores", "torch", "tengrad-triton", "started"):
        assert machine[key] == [str(session[key])]
    assert (trained / "tengrad-summary.txt").read_text().rstrip() in page


def test_every_start_has_a_column(run, text_of):
    edited(run, "machine.json", lambda sessions: [*sessions, sessions[0] | {"device": "another", "commit": None}])
    machine = table_after("## Where", text_of(run))
    assert machine["device"][1] == "another"
    assert machine["commit"][1] == "-"


def test_figures_lie_beside_the_page_and_are_those_of_the_run(trained, page):
    for name in FIGURES:
        assert f"(small%20run-{name}.png)" in page
        assert (trained.parent / f"docs/small run-{name}.png").read_bytes() == (trained / f"{name}.png").read_bytes()
    assert len(list((trained.parent / "docs").iterdir())) == 1 + len(FIGURES)


def test_no_absolute_path_is_on_the_page(trained, page):
    assert "--data DIR" in page
    assert str(trained.parent) not in page
    assert not re.search(r"(?<![\w.)%])[/~]\w", page)
    assert not re.search(r"[A-Z]:\\", page)


def test_a_page_is_the_same_when_written_again(trained, page, text_of):
    assert text_of(trained) == page


def test_an_unfinished_run_says_so(run, text_of):
    edited(run, "settings.json", lambda settings: settings | {"epochs": 5})
    assert (
        "tengrad has 2 of 5 epochs, tengrad_paper has 2 of 5 epochs, sgd has 2 of 5 epochs, adamw has 2 of 5 epochs"
        in text_of(run)
    )


def first_lines(text, count):
    return "".join(text.splitlines(keepends=True)[:count])


DAMAGES = {  # a file, what becomes of its text (None: the file is deleted), and the message
    "settings missing": ("settings.json", None, "settings.json"),
    "settings": ("settings.json", lambda _: "{", "settings.json"),
    "settings of another kind": ("settings.json", lambda _: "[]", "expected the settings of a run"),
    "unknown setting": ("settings.json", lambda _: '{"widht": 3}', "widht"),
    "machine missing": ("machine.json", None, "machine.json"),
    "no sessions": ("machine.json", lambda _: "[]", "expected a list of starts"),
    "sessions": ("machine.json", lambda _: '[{"device": "CPU"}]', "device_type, train_images"),
    "no epoch": ("metrics.json", None, "no epoch has ended yet: go on with `tengrad-triton train --resume"),
    "metrics": ("metrics.json", lambda text: text[:-9], "metrics.json"),
    "metrics emptied": ("metrics.json", lambda _: "[]", "metrics.json has the epochs of 0"),
    "a row": ("metrics.json", lambda _: "[3]", "expected one object for each optimizer and epoch"),
    "a column": ("metrics.json", lambda text: text.replace("test_loss", "loss"), "test_loss"),
    "a number": ("metrics.json", lambda text: text.replace('"epoch": 1', '"epoch": "x"'), "'x'"),
    "an infinite number": ("metrics.json", lambda text: text.replace('"epoch": 1', '"epoch": Infinity'), "infinity"),
    "steps cut in the last number": ("steps.csv", lambda text: text[:-3], "its last line is cut off"),
    "an optimizer": ("metrics.json", lambda text: text.replace("sgd", "sdg"), "'sdg'"),
    "steps missing": ("steps.csv", None, "steps.csv"),
    "steps empty": ("steps.csv", lambda _: "", "expected optimizer, step"),
    "steps cut": ("steps.csv", lambda text: text[:-60], "steps.csv"),
    "steps of fewer epochs": ("steps.csv", lambda text: first_lines(text, 22), "3 steps of adamw"),
    "steps out of order": ("steps.csv", lambda text: text.replace("sgd,1,", "sgd,2,"), "other steps of sgd"),
    "step of nobody": ("steps.csv", lambda text: text.replace("sgd", "sdg"), "'sdg'"),
    "binary steps": ("steps.csv", lambda _: b"\xff\xfe", "steps.csv"),
    "summary missing": ("tengrad-summary.txt", None, "tengrad-summary.txt"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_one_line_and_leaves_no_page(case, run, capsys):
    name, change, message = DAMAGES[case]
    file = run / name
    content = None if change is None else change(file.read_text())
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", "run", "--to", "docs/page.md"]) == 2
    assert message in one_line(capsys)
    assert not (run.parent / "docs").exists()


MISTAKES = {
    "no run": (["nowhere", "--to", "page.md"], "nowhere/settings.json"),
    "no folder": (["--to", "page.md"], "RUN"),
    "no page": (["run"], "--to"),
    "not Markdown": (["run", "--to", "page.html"], "end in .md"),
    "a page of someone else": (["run", "--to", "mine.md"], "not written by this command"),
    "into a file": (["run", "--to", "mine.md/page.md"], "cannot be written"),
    "a folder": (["run", "--to", "folder.md"], "cannot be written"),
    "flag": (["run", "--to", "page.md", "--width", "3"], "See tengrad-triton report --help."),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_replaces_nothing(case, run, capsys):
    arguments, message = MISTAKES[case]
    (run.parent / "mine.md").write_text("mine")
    (run.parent / "folder.md").mkdir()
    assert main(["report", *arguments]) == 2
    assert message in one_line(capsys)
    assert (run.parent / "mine.md").read_text() == "mine"
    assert {path.name for path in run.parent.iterdir()} == {"run", "mine.md", "folder.md"}


def test_an_older_page_is_replaced(run, text_of):
    (run.parent / "docs").mkdir()
    (run.parent / "docs/small run.md").write_text(f"{GENERATED}\nold")
    assert "old" not in text_of(run)


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_show_every_optimizer_in_its_color(trained, figure):
    with Image.open(trained / f"{figure}.png") as image:
        assert image.format == "PNG"
        assert min(image.size) >= 600
        colors = {color: count for count, color in image.convert("RGB").getcolors(2**24)}
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert colors.get(color, 0) > 100


@pytest.mark.parametrize("window", [1, 3, 25])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_running_mean_is_of_the_last_values(count, window):
    values_S = torch.rand(count, dtype=torch.float64)
    means = [values_S[max(0, last - window + 1) : last + 1].mean() for last in range(count)]
    torch.testing.assert_close(running_mean(values_S, window), torch.tensor(means, dtype=torch.float64))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300])
def test_figures_of_a_diverged_run_are_drawn(tmp_path, loss):
    steps = Steps(torch.arange(1.0, 4), torch.tensor([2.0, loss, loss]), torch.zeros(3))
    history = {"sgd": Record([EpochMetrics("sgd", epoch, loss, 0.1, loss, 0.1, 3.0, 1.0) for epoch in (1, 2)], steps)}
    draw(history, "diverged", tmp_path, "a-")
    assert {file.name for file in tmp_path.iterdir()} == {f"a-{name}.png" for name in FIGURES}


def test_one_epoch_has_no_figure_by_epoch(tmp_path):
    history = {"sgd": Record([EpochMetrics("sgd", 1, 2.0, 0.1, 2.0, 0.1, 3.0, 1.0)], Steps(*torch.ones(3, 3)))}
    draw(history, "one epoch", tmp_path, "a-")
    assert [file.name for file in tmp_path.iterdir()] == ["a-steps.png"]


def ticks_of(low, high):
    panel = Figure().subplots()
    panel.plot([0, 1], [low, high])
    log_axis(panel)
    low, high = panel.get_ylim()
    labels = zip(panel.get_yticks(), panel.get_yticklabels(), strict=True)
    return [label.get_text() for value, label in labels if low <= value <= high]


@pytest.mark.parametrize("high", [1.3, 2, 5, 12, 60, 1e3, 1e5])
def test_a_logarithmic_axis_has_enough_plain_numbers(high):
    labels = ticks_of(1.1, high)
    assert 3 <= len(labels) <= 10
    assert all(re.fullmatch(r"\d+(\.\d+)?(e\+\d+)?", label) for label in labels)
