"""Where a step's time goes, by name, for whoever runs it under `torch.profiler`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.profiler import record_function

Phase = Literal["capture", "curvature", "solve", "update"]
"""Rows and their derivatives; factoring them; the direction; what it does to the parameters."""


def phase(name: Phase) -> AbstractContextManager[Any]:
    """Return a range of that name in a running profile; nothing where there is none, and in compiled code."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return nullcontext()
    return record_function(name)
