"""The pieces of Markdown pages: tables, lists, blocks of code, and the table of machines."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    escaped = ([entry.replace("|", "\\|") for entry in line] for line in (heading, rule, *lines))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def bullets(items: dict[str, object]) -> str:
    """Return a list of names and values."""
    return "\n".join(f"- {key}: {value}" for key, value in items.items())


def block(text: str, language: str) -> str:
    """Return text as a block of code."""
    return f"```{language}\n{text}\n```"


def machine_table(sessions: Sequence[dict[str, Any]]) -> str:
    """Return a table with a column for each entry of machine.json: each time that the run was started or resumed."""
    keys = [key for key in sessions[0] if not key.endswith("_images")]
    lines = [(key, *(cell(session.get(key)) for session in sessions)) for key in keys]
    return table(("", *(f"start {number}" for number in range(1, len(sessions) + 1))), lines)


def cell(value: Any) -> str:
    """Return a value of machine.json as text; None becomes a dash."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(part)}" for key, part in value.items())
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
