"""Names for the phases of a step in a `torch.profiler` trace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.profiler import record_function

Phase = Literal["capture", "curvature", "solve", "update"]
"""Finding the rows of J; factoring the damped Gram matrices; solving for the direction; updating the parameters."""


def phase(name: Phase) -> AbstractContextManager[Any]:
    """Return a context that a running profiler shows as ``name``; it does nothing without one or in compiled code."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return nullcontext()
    return record_function(name)
