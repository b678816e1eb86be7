"""Tables as plain text that fits a width: titles and long texts wrap, and nothing is cut."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

GAP = "  "
LEAST = 16
"""The least width that a column of wrapped texts is narrowed to."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: stands above the cells; it may wrap.
        right: whether the cells are aligned on the right, as numbers are.
        wraps: whether the cells may wrap.
    """

    title: str
    right: bool = False
    wraps: bool = False


Row = Sequence[str] | str
"""A cell for each column, in which a newline begins another line; or one text across all columns."""


def table(columns: Sequence[Column], rows: Sequence[Row], width: int | None) -> list[str]:
    """Return the lines of a table.

    Args:
        columns: the columns.
        rows: the rows.
        width: the most columns of characters that a line takes, as long as no number is wider; None for no bound. Where
            the columns do not fit beside each other, each row becomes its first cell, and below it all others with
            their titles.
    """
    widths = _widths(columns, [row for row in rows if not isinstance(row, str)], width)
    if widths is None:
        assert width is not None
        return [line for row in rows for line in _record(columns, row, width)]
    total = sum(widths) + len(GAP) * (len(widths) - 1)
    titles = [wrapped(column.title, own) for column, own in zip(columns, widths, strict=True)]
    height = max(map(len, titles))
    raised = [[""] * (height - len(title)) + title for title in titles]  # they stand on the rule
    lines = [*_beside(columns, widths, raised), "─" * total]
    for row in rows:
        if isinstance(row, str):
            lines += wrapped(row, width, indent="    ")
        else:
            cells = [wrapped(cell, own) for cell, own in zip(row, widths, strict=True)]
            lines += _beside(columns, widths, cells)
    return lines


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """Return the lines of a text, each at most ``width`` wide; those after the first begin with ``indent``."""
    if width is None:
        return text.split("\n")
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_on_hyphens=False)
    return [line for part in text.split("\n") for line in wrapper.wrap(part) or [""]]


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[int] | None:
    """Return the width of each column; None if they do not fit into ``width``."""
    by_column = zip(*rows, strict=True) if rows else [()] * len(columns)
    of_cells = [max((len(line) for cell in cells for line in cell.split("\n")), default=0) for cells in by_column]
    widths = [max(cells, len(column.title)) for cells, column in zip(of_cells, columns, strict=True)]
    if width is None:
        return widths
    room = width - len(GAP) * (len(columns) - 1)
    if sum(widths) > room:
        words = [max(map(len, column.title.split()), default=0) for column in columns]
        widths = [max(pair) for pair in zip(of_cells, words, strict=True)]
        wrapping = [at for at, column in enumerate(columns) if column.wraps]
        while sum(widths) > room and wrapping:
            widest = max(wrapping, key=lambda at: widths[at])
            if widths[widest] <= max(LEAST, words[widest]):
                break
            widths[widest] -= 1
    return widths if sum(widths) <= room else None


def _beside(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of cells that stand beside each other."""
    return [
        GAP.join(
            part.rjust(own) if column.right else part.ljust(own)
            for column, own, part in zip(columns, widths, parts, strict=True)
        ).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]


def _record(columns: Sequence[Column], row: Row, width: int) -> list[str]:
    """Return a row as its first cell, and below it the others with their titles."""
    if isinstance(row, str):
        return wrapped(row, width, indent="    ")
    others = zip(columns[1:], row[1:], strict=True)
    pairs = (f"{column.title} {' '.join(cell.split())}" for column, cell in others if cell)
    return [*wrapped(row[0], width), *_filled(pairs, width)]


def _filled(pairs: Iterable[str], width: int) -> list[str]:
    """Return lines that keep each pair in one line where it fits."""
    lines = [""]
    for pair in pairs:
        longer = f"{lines[-1]}, {pair}" if lines[-1] else f"  {pair}"
        if len(longer) < width or not lines[-1]:  # there is room for a comma behind it
            lines[-1] = longer
        else:
            lines[-1] += ","
            lines.append(f"  {pair}")
    return [line for part in lines for line in wrapped(part, width, indent="    ")]
