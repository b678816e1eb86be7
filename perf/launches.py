"""Repeat short work within one measurement, so that the time of starting it does not dominate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from tengrad_triton.recipes.measuring.machine import now

SHORT = 1e-2  # seconds that one measurement takes at least
MOST_REPEATS = 200
log = logging.getLogger(__name__)


class Repeated:
    """Calls a function several times; on a GPU as one CUDA graph, which excludes the host's time."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> None:
        self._work, self._arguments, self._device = work, arguments, device
        self.graph: Any = None
        with torch.no_grad():
            for _ in range(2):  # compiles, and warms up
                work(*arguments)
            start = now(device)
            work(*arguments)
            once = now(device) - start
        self.times = max(1, min(MOST_REPEATS, int(SHORT / max(once, 1e-7))))
        if device.type == "cuda":
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether the calls are one CUDA graph."""
        return self.graph is not None

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._loop()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._loop()
            self.graph = graph
        except RuntimeError as error:  # some of torch's linear algebra synchronizes
            torch.cuda.synchronize()
            log.warning("not captured as a CUDA graph, timed by launches: %s", str(error).splitlines()[0])

    @torch.no_grad()
    def _loop(self) -> None:
        for _ in range(self.times):
            self._work(*self._arguments)

    def __call__(self) -> None:
        """Make all calls, and wait for the device."""
        if self.graph is None:
            self._loop()
        else:
            self.graph.replay()
        now(self._device)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Call once where the calls are not a graph: on a CPU this replaces what other work left in the caches."""
        if self.graph is None:
            self._work(*self._arguments)
            now(self._device)

    def seconds(self) -> float:
        """Return the time that one call takes."""
        self.warm_up()
        start = now(self._device)
        self()
        return (now(self._device) - start) / self.times
