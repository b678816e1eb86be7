"""Every block of code and every command of the documentation runs as it stands, at a tiny scale."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import a_quick_command
from helpers.pages import blocks_of, commands_in, run_python, spans_of
from helpers.paper import figures_not_rendered, measured_at_a_tiny_scale, write_data
from helpers.processes import errors_of
from torch import nn

from tengrad_triton import compile_train_step
from tengrad_triton.recipes.cli.commands import COMMANDS, parse
from tengrad_triton.recipes.cli.main import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples import gpt, poisson  # noqa: E402

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
DOCSTRINGS = {
    str(path.relative_to(ROOT)): ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for folder in ("examples", "studies", "release")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
}
GENERATED = "<!-- Written by"  # a page that shows what ran, at its own scale: its commands are parsed
PROGRAM = "tengrad-triton"
RUNS = {"python", "bash"}
# What else a block may be.
SHOWN = {"text": "what a program printed", "mermaid": "a drawing"}
# Blocks that cannot run: page and first line, and why.
CANNOT_RUN: dict[tuple[str, str], str] = {}


def blocks(page, language):
    """Return the blocks of a page that can run."""
    found = [block for block in blocks_of(PAGES[page]) if block.language == language]
    return [block for block in found if (page, block.text.partition("\n")[0]) not in CANNOT_RUN]


def pages_with(language):
    return [page for page in PAGES if blocks(page, language)]


def test_every_block_is_known():
    every = [(page, block) for page, text in PAGES.items() for block in blocks_of(text)]
    unknown = [f"{page}:{block.line}" for page, block in every if block.language not in {*RUNS, *SHOWN}]
    assert unknown == [], "name a language after the fence, and what is not code in SHOWN"
    assert CANNOT_RUN.keys() <= {(page, block.text.partition("\n")[0]) for page, block in every}


# -- Python ----------------------------------------------------------------------------------------------------------


def a_loop():
    """What a user has before the optimizer: a model, batches, and a loss."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    return {"model": model, "loader": [(x, y)] * 3, "loss_fn": F.cross_entropy, "x": x, "y": y}


def the_poisson_problem():
    """The script that the page shows parts of, with a small network."""
    x_ND = poisson.points(6, 4, torch.Generator().manual_seed(0))
    names = {**vars(poisson), "model": poisson.Residual((2, 5, 4, 1)).double()}

    def closure():  # which finds the optimizer that the page makes
        return poisson.loss_of(names["model"], names["optimizer"], lambda: x_ND)()

    names["closure"] = closure
    return names


# What a page's code takes as given; `a_loop` where the page is not here.
GIVEN = {
    "docs/guides/gpt.md": lambda: dict(vars(gpt)),
    "docs/guides/poisson.md": the_poisson_problem,
    "docs/guides/your-own-layer.md": dict,
}

# Packages of an extra that the code of a page needs; what they warn of is theirs.
NEEDED = {"docs/guides/trainers.md": ("transformers", "accelerate", "lightning", "peft")}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, with an empty cache of plans, and compile without inductor, which takes a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(compile_train_step.__kwdefaults__, "backend", "aot_eager")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with a_quick_command(), figures_not_rendered(), measured_at_a_tiny_scale():
        yield tmp_path


def python_page(page):
    return pytest.param(page, marks=pytest.mark.filterwarnings("default") if page in NEEDED else ())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what DCP says in one process
@pytest.mark.parametrize("page", [python_page(page) for page in pages_with("python")])
def test_python_runs(page, elsewhere):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)
    torch.manual_seed(0)
    run_python(page, blocks(page, "python"), GIVEN.get(page, a_loop)())


def test_given_names_are_of_pages():
    assert GIVEN.keys() <= set(pages_with("python"))


# -- the command line ------------------------------------------------------------------------------------------------

ON_A_CPU = {"--device": "cpu", "--threads": "1"}
# Flags that take the place of a command's own, for the sake of time.
SMALLER = {
    "train": {"--epochs": "1", "--train-limit": "64", "--test-limit": "32", "--width": "4", **ON_A_CPU},
    "autotune": {"--width": "4", "--seconds": "0.01", "--device": "cpu"},
    "paper": {
        **{"--scale.epochs": "1", "--scale.width": "4", "--scale.depth": "10", "--scale.batch-size": "16"},
        **{"--scale.train-images": "48", "--optimizer": "tengrad_paper", "--seeds": "1", **ON_A_CPU},
    },
}


def with_flags(words, flags):
    """Return the words of a command with other values for some flags, which are added where they are missing."""
    kept, dropping = [], False
    for word in words:
        dropping = word in flags or (dropping and not word.startswith("--"))
        kept += [] if dropping else [word]
    return [*kept, *(word for flag in flags.items() for word in flag)]


def data_of(words, data):
    """Return the flag of local images, for a command that would read the hub or has a placeholder."""
    if words[0] == "paper":
        return {"--data": str(data)}
    named = [after for flag, after in itertools.pairwise(words) if flag == "--dataset" and after != "digits"]
    return {"--data": str(data / named[0].replace("-", "_"))} if words[0] == "train" and named else {}


def small(words, data):
    """Return a command at a tiny scale; a run that is resumed has its own."""
    return words if "--resume" in words else with_flags(words, SMALLER.get(words[0], {}) | data_of(words, data))


SCRIPTS = {
    f"{page}:{block.line}": [command[1:] for command in commands_in(block.text) if command[0] == PROGRAM]
    for page in pages_with("bash")
    if not PAGES[page].startswith(GENERATED)
    for block in blocks(page, "bash")
}


@pytest.mark.filterwarnings("ignore:no exact rows for")  # what K-FAC says of norms
@pytest.mark.parametrize("script", [script for script, commands in SCRIPTS.items() if commands])
def test_the_command_line_runs(script, elsewhere, capsys):
    data = elsewhere / "data"
    data.mkdir()
    write_data(data)
    if any("runs/NAME" in command for command in SCRIPTS[script]):
        assert main(small(["train", "--out", "runs/NAME"], data)) == 0
    for command in SCRIPTS[script]:
        assert main(small(command, data)) == 0, command
        assert capsys.readouterr().err == "", command


# -- all commands ----------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What a page leaves to its reader.
PLACEHOLDERS = {"DIR": str(ROOT), "OUT": str(ROOT), "examples.NAME": "examples.poisson"}


def check_make(words):
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_pip(words):
    """Extras are the project's, and a file of versions is there; other packages have names."""
    assert words[0] == "install"
    for word in words[1:]:
        own = re.fullmatch(rf"(?:\.|{PROJECT['name']})\[(.*)\]", word)
        assert own is None or set(own[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
        assert not word.endswith((".txt", ".whl")) or (ROOT / word).is_file(), word


def check_own(words):
    """The command line reads the arguments. A sentence may name a command without them."""
    assert not words or words[0] in COMMANDS or parse(words) is None
    assert len(words) <= 1 or parse([PLACEHOLDERS.get(word, word) for word in words]) is not None


def check_paths(words):
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), word


def check_later(words):
    """`test_programs_read_their_arguments` checks these, in one process."""
    assert words


def check_torchrun(words):
    """`test_distributed_traffic` runs the program."""
    assert words in ([], ["--nproc-per-node", "2", "train.py"])


CHECKS = {
    **{"make": check_make, "pip": check_pip, PROGRAM: check_own, ".ci/run": lambda words: check_paths([".ci/run"])},
    **{"git": check_paths, "pre-commit": check_paths, "python": check_later, "pytest": check_later},
    "torchrun": check_torchrun,
}


def commands_of(text):
    """Yield the commands of a page's scripts, and those that stand in its sentences and tables."""
    for block in blocks_of(text):
        yield from commands_in(block.text) if block.language == "bash" else ()
    for span in spans_of(text):
        if re.match(rf"([A-Z_]+=\S+ )*(\.venv/bin/)?({'|'.join(map(re.escape, CHECKS))})(\s|$)", span):
            yield from commands_in(span)
        elif flags := re.match(r"--(\w+)\.\S+ \S", span):  # of the settings of a group: `--scale.width 4`
            command = ["paper", "all"] if flags[1] in {"scale", "grid"} else ["train"]
            yield [PROGRAM, *command, *shlex.split(span)]


NAMED = {tuple(command): page for page, text in (PAGES | DOCSTRINGS).items() for command in commands_of(text)}


@pytest.mark.parametrize("command", NAMED, ids=lambda words: " ".join(words)[:70])
def test_a_command_can_be_given(command):
    program, *words = command
    assert program in CHECKS, f"{NAMED[command]}: a program that no line of CHECKS knows"
    CHECKS[program](words)


# Code that ends once a program has read its arguments, with either of the two libraries that read them here.
READING = """
import argparse, cyclopts, runpy, sys
sys.path.insert(0, ".")
read = argparse.ArgumentParser.__dict__["parse_args"]

class Read(BaseException):
    pass

def with_argparse(parser, *given, **options):
    read(parser, *given, **options)
    raise Read

def with_cyclopts(app, *given, **options):
    app.parse_args(exit_on_error=False, print_error=False)
    raise Read

argparse.ArgumentParser.parse_args, cyclopts.App.__call__ = with_argparse, with_cyclopts
sys.argv = {argv}
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except Read:
    pass
except SystemExit as error:
    raise ValueError(error) from error
else:
    raise ValueError("reads no arguments")
finally:
    argparse.ArgumentParser.parse_args = read
"""
COLLECTING = """
import contextlib, io, pytest
with contextlib.redirect_stdout(io.StringIO()) as said:
    status = pytest.main({words} + ["--collect-only", "-q", "-p", "no:cacheprovider"])
assert status == 0, said.getvalue()
"""


def code_of(program, *words):
    """Return code that raises if a program does not know the words, or if they choose no test."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[:2] == ["-m", "pytest"]:
        program, words = "pytest", words[2:]
    if program == "pytest":
        return COLLECTING.format(words=words)
    if words[0] != "-m":
        return f"compile(open({words[0]!r}).read(), {words[0]!r}, 'exec')"
    if len(words) == 2:  # a sentence may name a program without the arguments that it needs
        return f"import importlib.util as i; assert i.find_spec({words[1]!r})"
    return READING.format(argv=words[1:])


def test_programs_read_their_arguments():
    named = [command for command in NAMED if CHECKS.get(command[0]) is check_later]
    assert errors_of({" ".join(command): code_of(*command) for command in named}) == {}
