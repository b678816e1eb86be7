"""A flag that is set for the duration of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ScopedFlag:
    """A flag that several objects share. It is set only within ``with flag.set():``."""

    def __init__(self) -> None:
        self.is_set = False

    @contextmanager
    def set(self) -> Iterator[None]:
        """Set the flag, and restore its former value when the context ends."""
        before, self.is_set = self.is_set, True
        try:
            yield
        finally:
            self.is_set = before
