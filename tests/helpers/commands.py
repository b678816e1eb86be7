"""The command line in tests: small runs, their files, and the one line of an error."""

import json
from contextlib import contextmanager

import pytest
import torch

from tengrad_triton.recipes.cli import report, train
from tengrad_triton.recipes.cli.main import main

PROCESS = "import sys; from tengrad_triton.recipes.cli.main import main; sys.exit(main())"
SMALL = ["--device", "cpu", "--threads", "1", "--width", "4", "--train-limit", "150", "--test-limit", "50"]
# Three steps an epoch, so that no epoch ends at a refresh.
SMALL += ["--batch-size", "64", "--tengrad-paper.refresh-every", "4"]


@contextmanager
def threads_restored():
    """Give torch its threads back at the end: commands set their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@contextmanager
def a_quick_command():
    """Draw no figures, which take most of a small run's time, and give torch its threads back."""
    with threads_restored(), pytest.MonkeyPatch.context() as patch:
        for command in (train, report):
            patch.setattr(command, "draw", lambda *_: None)
        yield


def train_small(out, *more):
    return main(["train", *SMALL, "--out", str(out), *more])


def metrics(run):
    """Return the epochs of metrics.json without the seconds, which no two runs share."""
    epochs = json.loads((run / "metrics.json").read_text())
    return [{key: value for key, value in epoch.items() if not key.endswith("_seconds")} for epoch in epochs]


def checkpoint(run, name):
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)


def one_line(capsys):
    """Return what stderr holds, which must be a single line without a traceback."""
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert error.startswith("tengrad-triton: ")
    return error
