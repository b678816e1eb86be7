"""Functions of residuals that `torch.compile` compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class CompilationError(Exception):
    """`torch.compile` cannot compile a residual function."""


def compiled(function: Callable[..., T], name: str) -> Callable[..., T]:
    """Return the function compiled; ``name`` is the term's, for errors.

    Raises:
        CompilationError: it cannot be compiled, at its first call.
    """
    graph: Any = torch.compile(function)

    def call(*args: Any) -> T:
        try:
            result: T = graph(*args)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompilationError(
                f"torch.compile failed on the residual {name!r} ({first}): leave out compiled=True, or write the "
                "residual so that it can be compiled"
            ) from error
        return result

    return call
