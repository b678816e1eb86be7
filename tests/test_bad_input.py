"""Every bad input of every command is one line and exit code 2, and no file of the user's changes."""

import errno
import hashlib
import os
import shlex
import shutil
import signal
import stat
import tempfile
import threading

import pytest
import torch
from bad_input_cases import BAD, FILES_IN_A_RUN, PAPER, PAPERS_RUN, TUNE, text
from helpers.commands import a_quick_command, one_line, threads_restored, train_small
from helpers.image_files import write_folder

from tengrad_triton import files
from tengrad_triton.recipes.cli import report
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.reports import run_figures
from tengrad_triton.recipes.training import loop
from tengrad_triton.tuning import plan_file
from tengrad_triton.tuning.plan import Measured, Plan

SECONDS = 60  # a command that reads a pipe or a device waits for ever


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """Make what a user has: a run that was interrupted in its second epoch, a plan, images, and files of their own."""
    folder = tmp_path_factory.mktemp("user")
    original, steps = loop.one_step, iter(range(100))

    def interrupted(*arguments):
        if next(steps) == 2 + 3 + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with a_quick_command(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", interrupted)
        assert train_small(folder / "run", "--epochs", "2", "--optimizer", "sgd") == 130
    plan = Plan({"a weight": {"factored": Measured({"gram_factored": {"torch": 1.0}}, 1)}})
    plan_file.save(plan, folder / "plan.json", torch.device("cpu"))
    (folder / "data" / "fashion_mnist").mkdir(parents=True)
    write_folder(folder / "data" / "fashion_mnist")
    (folder / "mine").mkdir()
    for name, content in {"mine.json": '{"a": 1}', "mine.md": "# Mine", "mine/notes.txt": "mine", "empty": ""}.items():
        (folder / name).write_text(content)
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


@pytest.fixture
def here(users, tmp_path, monkeypatch):
    """Work in a copy of what the user has, and end a command that waits for ever."""
    folder = tmp_path / "work"
    shutil.copytree(users, folder)
    monkeypatch.chdir(folder)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the command does not end"))
    signal.alarm(SECONDS)
    with a_quick_command():
        yield folder
    signal.alarm(0)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def what_is(folder):
    """Return every path below a folder, with its kind, mode, target, and a file's SHA-256 and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        content = (hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns) if path.is_file() else None
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            os.readlink(path) if path.is_symlink() else None,
            content,
        )
    return found


def assert_refused(arguments, message, folder, capsys):
    before = what_is(folder)
    assert main(shlex.split(arguments) if isinstance(arguments, str) else arguments) == 2
    assert message in one_line(capsys)
    after = what_is(folder)
    assert {name: after.get(name) for name in before} == before
    assert all(files.is_own(name.rpartition("/")[2]) for name in after.keys() - before.keys()), (
        after.keys() - before.keys()
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_harms_nothing(case, here, capsys):
    make, arguments, message = BAD[case]
    make(here)
    assert_refused(arguments, message, here, capsys)


@pytest.mark.parametrize("case", FILES_IN_A_RUN)
def test_a_folder_of_the_paper_that_holds_something_else_stays(case, here, capsys):
    FILES_IN_A_RUN[case](here)
    text("paper/asked.json", "[]")(here)
    before = what_is(here / PAPERS_RUN)
    assert main(shlex.split(f"{PAPER} --data data --out paper")) == 2
    assert "already there" in one_line(capsys)
    assert what_is(here / PAPERS_RUN) == before


# -- disks that fail --------------------------------------------------------------------------------------------------

COMMANDS = {
    "train": "train --device cpu --width 4 --epochs 1 --optimizer sgd --train-limit 64 --test-limit 64 --out new/run",
    "train --resume": "train --resume run",
    "report": "report run --to new.md",
    "autotune": f"{TUNE} --plan new.json",
    "paper": f"{PAPER} --data data --out paper",
}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_cannot_be_written_is_found_before_anything_is_done(command, number, here, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(loop, "one_step", lambda *_: pytest.fail("it trains"))
    assert_refused(COMMANDS[command], os.strerror(number), here, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_becomes_full_is_one_line_and_old_files_stay_whole(command, here, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = what_is(here)
    monkeypatch.setattr(os, "replace", full)
    assert main(shlex.split(COMMANDS[command])) == 2
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err
    assert shown.err.count("\n") == 1
    assert "kept in" not in shown.out
    after = what_is(here)
    assert {name: after.get(name) for name in before} == before
    assert not list(here.rglob("*.tmp"))


def test_a_checkpoint_that_torch_cannot_write_is_one_line(here, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/1")

    before = (here / "run/checkpoints/sgd.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    assert main(["train", "--resume", "run"]) == 2
    assert "PytorchStreamWriter failed" in (error := one_line(capsys))
    assert "go on with `tengrad-triton train --resume run`" in error
    assert (here / "run/checkpoints/sgd.pt").read_bytes() == before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with threads_restored():
        assert main(["train", "--resume", "run"]) == 0


# -- what the library wrote -------------------------------------------------------------------------------------------


def test_two_processes_do_not_train_into_one_folder(here, capsys):
    with files.locked(here / "run", "run", timeout=0):
        refused = []
        thread = threading.Thread(target=lambda: refused.append(main(["train", "--resume", "run"])))
        thread.start()
        thread.join()
    assert refused == [2]
    assert "run: another process trains into it: wait until it has ended" in one_line(capsys)


def test_a_resumed_run_keeps_what_others_put_into_its_folders(here):
    mine = ["run/notes.txt", "run/checkpoints/best.pt", "run/tensorboard/sgd/events.out.tfevents.1.mine"]
    for name in mine:
        text(name, "mine")(here)
    text("run/.tengrad-triton-0123.tmp", "of a process that was killed")(here)
    assert main(["train", "--resume", "run"]) == 0
    assert [(here / name).read_text() for name in mine] == ["mine"] * 3
    assert not list((here / "run").rglob("*.tmp"))
    assert len(list((here / "run/tensorboard/sgd").iterdir())) == 2  # theirs, and one of ours


def test_a_finished_run_of_the_paper_keeps_the_checkpoints_of_others(here):
    command = shlex.split(f"{PAPER} --data data --out paper")
    text(f"{PAPERS_RUN}/settings.json", "")(here)
    shutil.rmtree(here / "paper")
    assert main(command) == 0
    assert not (here / PAPERS_RUN / "checkpoints").exists()
    (here / PAPERS_RUN / "outcome.json").unlink()
    text(f"{PAPERS_RUN}/checkpoints/mine.pt", "mine")(here)
    assert main(command) == 0
    assert [file.name for file in (here / PAPERS_RUN / "checkpoints").iterdir()] == ["mine.pt"]


def test_figures_and_pages_of_the_command_are_replaced(here):
    link = here / "link.md"
    link.symlink_to("docs/page.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", run_figures.draw)
        for page in ("docs/page.md", "docs/page.md", "link.md"):
            assert main(["report", "run", "--to", page]) == 0
    assert link.is_symlink()
    # a run of one epoch has no figures by epoch
    assert {file.name for file in (here / "docs").iterdir()} == {"page.md", "page-steps.png"}


def test_new_files_have_the_users_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
