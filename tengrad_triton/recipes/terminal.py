"""What a command prints to: a terminal of some width, or a file or pipe, where nothing bounds a line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tengrad_triton.tables import Column, Row, table, wrapped

UNBOUNDED = 10_000
"""The width of a file: a reader of files scrolls, and a script wants one line for each row."""


def new_console() -> Console:
    """Return a console that prints texts as they are, whatever brackets and colons a file's name has."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console


def can_redraw(console: Console) -> bool:
    """Return whether a bar can move on this console: it is a terminal, and TERM is not `dumb`."""
    return console.is_terminal and not console.is_dumb_terminal


@dataclass(frozen=True)
class FittedTable:
    """A table that takes the width of the console that it is printed to, with a caption below."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = ["", *table(self.columns, self.rows, width), "", *wrapped(self.caption, width)]
        yield Text("\n".join(lines), no_wrap=True, overflow="ignore")
