"""Flags that are set during backward passes of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class PassFlags:
    """The flags of one capture.

    Attributes:
        own: this pass, or this forward, is one of ours: the hooks ignore it.
        detached: batch statistics are constants in this backward pass.
        affine: this backward pass, with detached statistics, needs the gradients of the batch norms' own parameters.
    """

    own: ScopedFlag = field(default_factory=ScopedFlag)
    detached: ScopedFlag = field(default_factory=ScopedFlag)
    affine: ScopedFlag = field(default_factory=ScopedFlag)

    @contextmanager
    def rows(self, *, affine: bool = False) -> Iterator[None]:
        """Set the flags for a backward pass that computes rows."""
        with ExitStack() as stack:
            for flag in (self.own, self.detached, *([self.affine] if affine else [])):
                stack.enter_context(flag.set())
            yield
