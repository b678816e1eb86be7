"""The table of estimates, in 80 columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from tengrad_triton.recipes.paper.memory import readable
from tengrad_triton.recipes.terminal import FittedTable
from tengrad_triton.tables import Column

COLUMNS = (
    Column("what", wraps=True),
    Column("optimizer", wraps=True),
    Column("runs", right=True),
    Column("each", right=True),
    Column("all", right=True),
    Column("memory", right=True),
)


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

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table; a target is no series of runs."""
        of_runs = (str(self.count), duration(self.each)) if self.optimizer else ("", "")
        return (self.what, self.optimizer, *of_runs, duration(self.seconds), readable(self.bytes))


def table_of(rows: Sequence[Row], now: datetime) -> FittedTable:
    """Return the table, with the sum of the times and when they end, counted from ``now``."""
    seconds = sum(row.seconds for row in rows)
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f" on {end:%Y-%m-%d}"
    caption = (
        f"estimated: {duration(seconds)} in all; begun now, it ends at {end:%H:%M}{day}; memory is the least of each"
    )
    return FittedTable(COLUMNS, [row.cells() for row in rows], caption)


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes, hours or days."""
    for unit, size, largest in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < largest:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds / 86400:.1f} days"
