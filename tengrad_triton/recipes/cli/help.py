"""The layout of `--help`: no flag is broken, however narrow the terminal is."""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts.help import ColumnSpec, DefaultFormatter, HelpEntry, HelpPanel, NameRenderer
from cyclopts.help.specs import get_default_parameter_columns
from rich.console import Console, ConsoleOptions

LABELS = NameRenderer()
"""From an entry to its flags and the name of its value, in one line."""


def description_of(command: Callable[..., Any]) -> str:
    """Return the paragraphs of a command's docstring, each in one line: the terminal wraps them."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").partition("\n\nParameters\n")[0].split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


class WholeFlags(DefaultFormatter):
    """The panels of cyclopts, but the column of flags is as wide as the longest flag.

    cyclopts bounds it to about a third of the terminal, and breaks what is longer.
    """

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a panel."""
        self.column_specs = None if panel.format == "command" else _columns
        super().__call__(console, options, panel)


def _columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    columns: Sequence[ColumnSpec] = get_default_parameter_columns(console, options, entries)
    flags = (word for entry in entries for word in str(LABELS(entry)).split())
    width = max([columns[-2].max_width or 0, *map(len, flags)])

    def in_lines(entry: HelpEntry) -> str:
        return textwrap.fill(str(LABELS(entry)), width, subsequent_indent="  ", break_on_hyphens=False)

    return (*columns[:-2], columns[-2].copy(renderer=in_lines, max_width=width, no_wrap=True), columns[-1])
