"""The command line on terminals of any width and in pipes: every number is there, and nothing is cut."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from helpers.commands import PROCESS, SMALL
from rich.console import Console

from tengrad_triton.recipes.cli.autotune import table_of
from tengrad_triton.recipes.cli.commands import COMMANDS
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.cli.train import outcome_table
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.reports.comparison import outcomes
from tengrad_triton.recipes.terminal import UNBOUNDED, can_redraw, new_console
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record
from tengrad_triton.recipes.training.progress import Progress
from tengrad_triton.recipes.training.settings import Settings
from tengrad_triton.tuning.plan import Measured, Plan

NAMES = tuple(OPTIMIZERS)
LONGEST = max(NAMES, key=len)
GEOMETRIES = [
    "N128 G1 P64 I36 O4 conv [3, 3] stride (1, 1) padding (1, 1) dilation (1, 1) of [8, 8] 32-bit",
    "N128 G1 P1 I500 O10 dense 32-bit",
]


def history():
    """Return the metrics of every optimizer, with numbers as long as they get."""
    epochs = {name: EpochMetrics(name, 115, 12.3456, 0.5, 2.5, 1.0, 12345.6, 1.0) for name in NAMES}
    return {name: Record([epoch]) for name, epoch in epochs.items()}


def plan():
    """Return a plan with two candidates for each geometry, and names of kernels that are long."""
    fast = Measured({"gram_rows": {"torch": 1e-4, "triton": 2e-4}}, 2**30)
    slow = Measured({"expand_conv_update_": {"torch": 12.3e-3}, "conv_sample_grads": {"torch": 2e-4}}, 2**20)
    return Plan({key: {"per_sample": fast, "per_sample_bf16": slow} for key in GEOMETRIES})


# Every table of a command, and the words that it must show.
TABLES = {
    "train": (lambda: outcome_table(history()), [cell for row in outcomes(history()) for cell in row]),
    "plan": (
        lambda: table_of(plan(), 100),
        [*GEOMETRIES, "per_sample", "gram_rows:torch", "1024.0", "per_sample_bf16"],
    ),
}


def plain(text):
    """Return a text without the codes that move a terminal's cursor."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)


def printed(table, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200, UNBOUNDED])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_word_and_number_at_every_width(name, width):
    make, cells = TABLES[name]
    text = printed(make(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = set(re.split(r"[\s,]+", text))
    assert {word for cell in cells for word in re.split(r"[\s,]+", cell)} <= words


@pytest.mark.parametrize("name", TABLES)
def test_a_pipe_gets_a_line_for_each_row(name):
    table = TABLES[name][0]()
    lines = printed(table, UNBOUNDED).splitlines()
    assert [line.split("  ")[0] for line in lines[3 : 3 + len(table.rows)]] == [row[0] for row in table.rows]
    assert all(line == line.rstrip() for line in lines)


# -- the console -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "width"), [(None, UNBOUNDED), ("60", 60), ("200", 200)])
def test_a_pipe_is_as_wide_as_its_lines_unless_columns_says(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert new_console().width == width


def test_names_of_files_are_printed_as_they_are(capsys):
    new_console().print("runs/[red]a:smile:[/] 12 'x'", soft_wrap=True)
    assert capsys.readouterr().out == "runs/[red]a:smile:[/] 12 'x'\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_bar_shows_name_and_numbers_at_every_width(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    assert can_redraw(console)
    with Progress.of(console, LONGEST, 15, 100) as progress:
        progress.epoch(EpochMetrics(LONGEST, 7, 0.1234, 0.999, 0.2, 0.95, 1.0, 1.0))
    text = console.file.getvalue()
    assert "…" not in text
    assert {LONGEST, "7/15", "0.123", "99.9%"} <= set(plain(text).split())
    assert ("━" in text) == (width >= 80)


@pytest.mark.parametrize("terminal", [True, False])
def test_where_no_bar_can_move_each_epoch_is_a_line(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(width=UNBOUNDED, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with Progress.of(console, "sgd     ", 15, 100) as progress:
        progress.epoch(EpochMetrics("sgd", 7, 0.1234, 0.999, 0.2, 0.95, 1.0, 1.0))
    expected = "train loss 0.1234, accuracy 99.90%  test loss 0.2000, accuracy 95.00%  1.00 s"
    assert console.file.getvalue() == f"sgd      epoch 7/15  {expected}\n"


# -- the help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["60", "80", "120"])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_the_help_breaks_no_flag_at_any_width(command, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    assert main([command, "--help"] if command else []) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= int(width)
    assert "…" not in shown
    if command == "train":
        flags = {*Settings().flags(), "--data", "--threads", "--out", "--resume"}
        assert flags <= set(shown.split())


def test_no_arguments_are_a_short_help_that_begins_with_train(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24
    assert [shown.index(f"│ {command} ") for command in COMMANDS] == sorted(shown.index(f"│ {c} ") for c in COMMANDS)


@pytest.mark.parametrize(("arguments", "said"), [(["trian"], "train"), (["plan"], "ACTION"), (["--foo"], "--foo")])
def test_a_wrong_command_is_one_line_that_says_where_help_is(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.endswith("--help.\n")
    assert error.count("\n") == 1


# -- processes -------------------------------------------------------------------------------------------------------

TRAIN = ["train", *SMALL, "--optimizer", LONGEST, "sgd", "--epochs"]


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "TERM")}
    return kept | variables


@pytest.mark.parametrize("variables", [{}, {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}], ids=str)
def test_a_run_in_a_pipe_is_plain(variables, tmp_path):
    command = [sys.executable, "-c", PROCESS, *TRAIN, "3", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"\x1b", "…", "\r"} & set(done.stdout)
    assert done.stdout.count(f"{LONGEST} epoch ") == 3
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_a_run_on_a_terminal_of_80_columns_fits_it(tmp_path):
    command = [sys.executable, "-c", PROCESS, *TRAIN, "3", "--out", str(tmp_path / "run")]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, env=environment(TERM="xterm"), **streams)
    os.close(theirs)
    text = b""
    while chunk := read(ours):
        text += chunk
    os.close(ours)
    assert process.wait() == 0, text
    shown = plain(text.decode())
    assert "…" not in shown
    named = [line for line in re.split(r"[\r\n]+", shown) if str(tmp_path) not in line]  # a path is never broken
    assert max(map(len, named)) <= 80
    assert LONGEST in shown


def read(terminal):
    """Return what a terminal shows next; nothing at the end, which Linux calls an error."""
    try:
        return os.read(terminal, 2**16)
    except OSError:
        return b""


# Arguments, the code, and what is said when the reader of the output goes away after the first line.
CLOSED = {
    "help": (["train", "--help"], 1, ""),
    "training": (
        [*TRAIN, "50", "--out", "run"],
        130,
        "interrupted: go on with `tengrad-triton train --resume run`",
    ),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_reader_that_goes_away_is_no_traceback(case, tmp_path):
    arguments, code, said = CLOSED[case]
    command = [sys.executable, "-c", PROCESS, *arguments]
    with subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == code
    assert error == (f"tengrad-triton: {said}\n" if said else "")
