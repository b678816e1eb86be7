"""Says which piece of the work is under way, so that no command is silent for long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from tengrad_triton.recipes.terminal import can_redraw

Tell = Callable[[str], None]


@contextmanager
def telling(console: Console, what: str, total: int) -> Iterator[Tell]:
    """Yield a function that takes the name of each piece as it begins.

    It shows "what 2 of 5: piece": on a terminal in one line with a running clock, elsewhere in a line for each piece.
    """
    text = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
    columns = (SpinnerColumn(), text, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not can_redraw(console)) as bar:
        task, numbers = bar.add_task(what, total=None), count(1)

        def tell(piece: str) -> None:
            line = f"{what} {next(numbers)} of {total}: {piece}"
            if bar.disable:
                console.print(line, soft_wrap=True, highlight=False)
            bar.reset(task, description=line)

        yield tell
