"""Names that a user may have misspelt."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """Return, in brackets, a question for the known names that are like a misspelt one; nothing if none are."""
    close = get_close_matches(str(value), list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
