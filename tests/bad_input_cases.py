"""Bad input for every command: what the user's disk has, what is asked for, and a part of the message.

A new bad input is a row. `test_bad_input.py` makes the files that the rows start from, and takes the rows.
"""

import os
import shutil
import socket

import torch

from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.tuning import plan_file

TUNE = "autotune --model mlp --width 4 --batch-size 8 --seconds 0.0001 --device cpu"
PAPER = "paper table2 --row 3C1F --seeds 1 --optimizer sgd --scale.width 4 --scale.epochs 1 --device cpu --threads 1"
PAPERS_RUN = f"paper/runs/{EXPERIMENTS[0].key}/sgd-seed0"
LONG = "x" * 300


def nothing(folder):
    pass


def make_socket(folder):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("special")


def text(name, content):
    def write(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(content)

    return write


def changed(name, change):
    return lambda folder: text(name, change((folder / name).read_text()))(folder)


def is_folder(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return make


def is_pipe(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def is_link(name, target):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def read_only(name):
    return lambda folder: (folder / name).chmod(0o444 if (folder / name).is_file() else 0o555)


def many(*makers):
    return lambda folder: [make(folder) for make in makers]


CUT_PLAN = plan_file.HEAD + ' "header": {'
NO_PLANS = {  # what is no plan, for plan show and for autotune
    "a folder": (nothing, "mine", "mine: "),
    "a run's settings": (nothing, "run/settings.json", "run/settings.json: no plan"),
    "somebody's JSON": (nothing, "mine.json", "mine.json: no plan"),
    "an empty file": (nothing, "empty", "empty: no plan"),
    "a binary file": (nothing, "binary", "binary: no plan"),
    "nested too deeply": (nothing, "deep.json", "deep.json: no plan"),
    "a pipe": (is_pipe("special"), "special", "not a regular file"),
    "a socket": (make_socket, "special", "special: cannot be"),
    "a device": (nothing, "/dev/zero", "not a regular file"),
    "a link to a device": (is_link("special", "/dev/zero"), "special", "not a regular file"),
    "a link to somebody's file": (is_link("special", "mine.json"), "special", "special: no plan"),
    "a link to nothing": (is_link("special", "nowhere"), "special", "special: "),
    "a link to itself": (is_link("special", "special"), "special", "special: "),
    "in a file": (nothing, "mine.md/plan.json", "mine.md/plan.json: cannot be"),
    "a long name": (nothing, LONG, "File name too long"),
    "a plan of another device": (
        changed("plan.json", lambda plan: plan.replace('"arch": "', '"arch": "other ')),
        "plan.json",
        "arch 'other ",
    ),
}
NO_RUNS = {  # what is wrong with a run, for train --resume and for report
    "no folder": (nothing, "nowhere", "nowhere/settings.json"),
    "a file": (nothing, "mine.json", "mine.json/settings.json: Not a directory"),
    "a folder of somebody": (nothing, "mine", "mine/settings.json: No such file"),
    "a long name": (nothing, LONG, "File name too long"),
    "settings of another program": (
        text("mine/settings.json", '{"theme": "dark"}'),
        "mine",
        "got theme: name the folder",
    ),
    "no settings": (text("mine/settings.json", "{}"), "mine", "got nothing: name the folder of a run"),
    "settings of another kind": (text("mine/settings.json", "[1]"), "mine", "got list: name the folder of a run"),
    "settings that are binary": (lambda folder: shutil.copy("binary", "mine/settings.json"), "mine", "settings.json: "),
    "settings nested too deeply": (
        lambda folder: shutil.copy("deep.json", "mine/settings.json"),
        "mine",
        "settings.json: ",
    ),
    "settings are a folder": (is_folder("run/settings.json"), "run", "settings.json: a folder"),
    "settings are a pipe": (is_pipe("run/settings.json"), "run", "not a regular file"),
    "settings are a device": (is_link("run/settings.json", "/dev/zero"), "run", "not a regular file"),
    "settings are cut off": (changed("run/settings.json", lambda text: text[:-9]), "run", "settings.json: "),
    "a setting of another kind": (
        changed("run/settings.json", lambda text: text.replace('"epochs": 2', '"epochs": "two"')),
        "run",
        "epochs",
    ),
    "an optimizer that is not registered": (
        changed("run/settings.json", lambda text: text.replace("{", '{"my_lion": {"lr": 0.1},', 1)),
        "run",
        "run/settings.json: has settings of my_lion, which is no optimizer of this installation",
    ),
    "an unknown setting": (
        changed("run/settings.json", lambda text: text.replace("{", '{"widht": 3,', 1)),
        "run",
        "widht",
    ),
}
RESUMED = {
    "a checkpoint is a folder": (is_folder("run/checkpoints/sgd.pt"), "sgd.pt: "),
    "a checkpoint is a pipe": (is_pipe("run/checkpoints/sgd.pt"), "sgd.pt: "),
    "a checkpoint is a link to nothing": (is_link("run/checkpoints/sgd.pt", "nowhere"), "sgd.pt: "),
    "a checkpoint is text": (text("run/checkpoints/sgd.pt", "mine"), "sgd.pt: damaged"),
    "a checkpoint has other epochs": (
        lambda folder: torch.save({"rows": [1], "steps": {}}, folder / "run/checkpoints/sgd.pt"),
        "a checkpoint holds no epochs",
    ),
    "the machine is cut off": (changed("run/machine.json", lambda text: text[:-9]), "machine.json: "),
    "the machine is of another kind": (text("run/machine.json", "{}"), "machine.json: expected a list of starts"),
    "the machine is a pipe": (is_pipe("run/machine.json"), "run/machine.json: cannot be written (not a regular file)"),
    "metrics are a folder": (is_folder("run/metrics.json"), "run/metrics.json: cannot be written (a folder)"),
    "metrics are a link": (is_link("run/metrics.csv", "../mine.md"), "run/metrics.csv: cannot be written (a link)"),
    "a read-only folder": (read_only("run"), "run: cannot be written (read-only folder)"),
    "read-only checkpoints": (read_only("run/checkpoints"), "checkpoints: cannot be written (read-only folder)"),
    "a read-only checkpoint": (read_only("run/checkpoints/sgd.pt"), "sgd.pt: cannot be written (read-only file)"),
    "read-only metrics": (read_only("run/metrics.csv"), "metrics.csv: cannot be written (read-only file)"),
    "read-only TensorBoard": (read_only("run/tensorboard/sgd"), "tensorboard/sgd: cannot be written"),
    "TensorBoard is a file": (
        many(lambda folder: shutil.rmtree("run/tensorboard"), text("run/tensorboard", "mine")),
        "run/tensorboard: cannot be written (Not a directory)",
    ),
    "a lock of somebody": (text("run/.tengrad-triton-run.lock", "mine"), "run.lock is no lock of this library"),
    "a run of the paper that has ended": (
        text("run/outcome.json", "{}"),
        "a run of tengrad-triton paper, which has ended",
    ),
}
OUTS = {  # for train --out
    "a file": (nothing, "mine.md", "already there"),
    "a folder with files": (nothing, "mine", "already there"),
    "a run": (nothing, "run", "already there"),
    "a link to a folder with files": (is_link("special", "mine"), "special", "already there"),
    "a link to nothing": (is_link("special", "nowhere"), "special", "already there"),
    "a pipe": (is_pipe("special"), "special", "already there"),
    "a device": (nothing, "/dev/zero", "already there"),
    "in a file": (nothing, "mine.md/run", "Not a directory"),
    "in a device": (nothing, "/dev/zero/run", "Not a directory"),
    "a long name": (nothing, LONG, "File name too long"),
    "a long name in a new folder": (nothing, f"{LONG}/run", "File name too long"),
    "a read-only folder": (many(is_folder("new"), read_only("new")), "new", "read-only folder"),
    "in a read-only folder": (read_only("mine"), "mine/run", "read-only folder"),
}
PAGES = {  # for report --to
    "a page of somebody": (nothing, "mine.md", "mine.md is there, and not written by this command"),
    "no Markdown": (nothing, "mine.json", "let its name end in .md"),
    "a folder": (is_folder("page.md"), "page.md", "cannot be written (a folder)"),
    "a pipe": (is_pipe("page.md"), "page.md", "cannot be written (not a regular file)"),
    "a link to somebody's page": (is_link("page.md", "mine.md"), "page.md", "not written by this command"),
    "a link to nothing": (is_link("page.md", "nowhere.md"), "page.md", "cannot be written (a link)"),
    "an empty page": (text("page.md", ""), "page.md", "not written by this command"),
    "a figure of somebody": (text("page-loss.png", "mine"), "page.md", "page-loss.png is there, and not written by"),
    "a figure is a link": (is_link("page-loss.png", "binary"), "page.md", "cannot be written (a link)"),
    "in a file": (nothing, "mine.md/page.md", "Not a directory"),
    "in a read-only folder": (read_only("mine"), "mine/page.md", "read-only folder"),
    "a long name": (nothing, f"{LONG}.md", "File name too long"),
    "a name that is too long with a figure's": (nothing, f"{LONG[:250]}.md", "File name too long"),
}
REPORTS = {  # for paper --out
    "a file": (nothing, "mine.md", "Not a directory"),
    "a folder with files": (nothing, "mine", "has files, but no asked.json with the commands of a report"),
    "a run": (nothing, "run", "has files, but no asked.json"),
    "a link to a folder with files": (is_link("special", "mine"), "special", "has files, but no asked.json"),
    "a link to nothing": (is_link("special", "nowhere"), "special", "cannot be written"),
    "asked.json of somebody": (text("mine/asked.json", "{}"), "mine", "has files, but no asked.json"),
    "asked.json is cut off": (text("mine/asked.json", "["), "mine", "asked.json: "),
    "asked.json is a pipe": (is_pipe("mine/asked.json"), "mine", "not a regular file"),
    "a device": (nothing, "/dev/zero", "Not a directory"),
    "in a file": (nothing, "mine.md/paper", "Not a directory"),
    "in a read-only folder": (read_only("mine"), "mine/paper", "read-only folder"),
    "a read-only folder": (many(text("paper/asked.json", "[]"), read_only("paper")), "paper", "read-only folder"),
    "a long name": (nothing, LONG, "File name too long"),
    "settings of another program": (
        many(text("paper/asked.json", "[]"), text(f"{PAPERS_RUN}/settings.json", "{}")),
        "paper",
        "expected the settings of a run",
    ),
    "a run with other settings": (
        many(text("paper/asked.json", "[]"), lambda folder: shutil.copytree("run", PAPERS_RUN)),
        "paper",
        "was run with another",
    ),
}
FILES_IN_A_RUN = {  # of the paper, in folders that it would otherwise have deleted
    "no settings": text(f"{PAPERS_RUN}/notes.txt", "mine"),
    "checkpoints without settings": text(f"{PAPERS_RUN}/checkpoints/mine.pt", "mine"),
}
DATA = {  # for train --data and paper --data
    "nothing": (nothing, "nowhere", "does not exist"),
    "a file": (nothing, "mine.md", "mine.md"),
    "no Parquet": (nothing, "mine", "no test-*.parquet in it, nor in a folder cifar10 of it"),
    "another data set": (nothing, "data/fashion_mnist", "is this another --dataset?"),
    "a Parquet file is a folder": (is_folder("mine/test-0.parquet"), "mine", "cannot be read"),
    "a Parquet file of somebody": (text("mine/test-0.parquet", "mine"), "mine", "cannot be read"),
}

BAD = {
    **{f"plan show: {name}": (make, f"plan show {path}", what) for name, (make, path, what) in NO_PLANS.items()},
    "plan show: nothing": (nothing, "plan show nowhere", "no such plan: make one with tengrad-triton autotune"),
    "plan show: a damaged plan": (text("cut.json", CUT_PLAN), "plan show cut.json", "a damaged plan"),
    **{f"autotune: {name}": (make, f"{TUNE} --plan {path}", what) for name, (make, path, what) in NO_PLANS.items()},
    "autotune: in a read-only folder": (read_only("mine"), f"{TUNE} --plan mine/new/plan.json", "read-only folder"),
    "autotune: a read-only plan": (read_only("plan.json"), f"{TUNE} --plan plan.json", "read-only file"),
    "autotune: a lock of somebody": (
        text("mine/.tengrad-triton-plan.lock", "mine"),
        f"{TUNE} --plan mine/plan.json",
        "is no lock of this library",
    ),
    **{
        f"train --resume: {name}": (make, f"train --resume {path}", what)
        for name, (make, path, what) in NO_RUNS.items()
    },
    **{f"train --resume: {name}": (make, "train --resume run", what) for name, (make, what) in RESUMED.items()},
    **{f"train --out: {name}": (make, f"train --out {path}", what) for name, (make, path, what) in OUTS.items()},
    "train --plan: somebody's JSON": (
        nothing,
        "train --device cpu --optimizer tengrad --tengrad.plan mine.json",
        "no plan",
    ),
    **{f"report: {name}": (make, f"report {path} --to new.md", what) for name, (make, path, what) in NO_RUNS.items()},
    "report: metrics are cut off": (
        changed("run/metrics.json", lambda text: text[:-9]),
        "report run --to new.md",
        "metrics.json: ",
    ),
    "report: steps are cut off": (
        changed("run/steps.csv", lambda text: text[:-9]),
        "report run --to new.md",
        "steps.csv",
    ),
    "report: steps are a pipe": (is_pipe("run/steps.csv"), "report run --to new.md", "not a regular file"),
    **{f"report --to: {name}": (make, f"report run --to {path}", what) for name, (make, path, what) in PAGES.items()},
    **{
        f"paper --out: {name}": (make, f"{PAPER} --data data --out {path}", what)
        for name, (make, path, what) in REPORTS.items()
    },
    **{
        f"train --data: {name}": (make, f"train --dataset cifar10 --data {path} --out new", what)
        for name, (make, path, what) in DATA.items()
    },
    **{
        f"paper --data: {name}": (
            make,
            f"{PAPER.replace('3C1F', 'wrn-28-4-cifar10')} --data {path} --out new",
            what,
        )
        for name, (make, path, what) in DATA.items()
    },
}
