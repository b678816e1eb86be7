"""The table of estimates, in 80 columns."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tengrad_triton.recipes.paper.memory import readable


@dataclass(frozen=True)
class Row:
    """The estimate of runs of one kind, or of a target.

    Attributes:
        what: an experiment's title or a target.
        optimizer: of the runs; empty for a target.
        count: number of runs.
        each: seconds of a whole run.
        seconds: of all, without what is done already.
        bytes: the least memory that one needs.
    """

    what: str
    optimizer: str
    count: int
    each: float
    seconds: float
    bytes: int


def table_of(rows: Iterable[Row]) -> Table:
    """Return the table. Long names go on in a second line where the terminal is narrow: no cell is cut."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("what", "optimizer"):
        table.add_column(heading, overflow="fold")
    for heading in ("runs", "each", "all", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        count = str(row.count) if row.optimizer else ""
        each = duration(row.each) if row.optimizer else ""
        table.add_row(row.what, row.optimizer, count, each, duration(row.seconds), readable(row.bytes))
    return table


def sum_of(rows: Iterable[Row], now: datetime) -> str:
    """Return the time of all rows and when it ends, as a sentence."""
    seconds = sum(row.seconds for row in rows)
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f" on {end:%Y-%m-%d}"
    return f"estimated: {duration(seconds)} in all; begun now, it ends at {end:%H:%M}{day}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes, hours or days."""
    for unit, size, largest in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < largest:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"
