"""The page about the command line: what ``--help`` prints."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from unittest.mock import patch

from tengrad_triton.recipes.cli.commands import COMMANDS, parse

COLUMNS = 80  # as many as fit beside the table of contents

INTRODUCTION = """
# Command line

This is the output of `tengrad-triton --help`, and of `--help` for each command. `pip install 'tengrad-triton[train]'`
installs what the commands need.
"""


def page() -> str:
    """Return the page in Markdown."""
    sections = [f"## tengrad-triton {name}\n\n{_help([name])}" for name in COMMANDS]
    return "\n\n".join([INTRODUCTION.strip(), _help([]), *sections]) + "\n"


def _help(command: list[str]) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown), patch.dict(os.environ, COLUMNS=str(COLUMNS), NO_COLOR="1"):
        parse([*command, "--help"])
    lines = [line.rstrip() for line in shown.getvalue().strip().splitlines()]
    return "\n".join(["```text", *lines, "```"])
