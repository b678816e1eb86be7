"""The machine's limits, measured: bytes a second and floating-point operations a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch

from tengrad_triton.recipes.measuring.machine import now

ROUNDS = 7


@dataclass(frozen=True)
class Limits:
    """The device's rates: of a copy between two large tensors, and of a large float32 matrix product in torch."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: int, moved: int) -> float:
        """Return the least time in seconds for so many operations and bytes."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)

    def as_dict(self) -> dict[str, float]:
        """Return the rates by name."""
        return asdict(self)


@cache
def measure(device: torch.device, small: bool = False) -> Limits:
    """Measure the device, once; ``small`` sizes take a moment, and give lower rates than the machine has."""
    gpu = device.type == "cuda"
    entries, n = (2**28, 8192) if gpu else (2**20, 256) if small else (2**26, 2048)
    source = torch.randn(entries, device=device)  # equal numbers switch fewer transistors: a GPU is faster on them
    target = torch.empty_like(source)
    copying = _best(partial(target.copy_, source), device)
    x, y = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    with allowing_tf32(convolutions=False, products=False):
        multiplying = _best(partial(torch.matmul, x, y), device)
    return Limits(2 * 4 * entries / copying, 2 * n**3 / multiplying)


@contextmanager
def allowing_tf32(convolutions: bool, products: bool) -> Iterator[None]:
    """Let torch round the factors of float32 convolutions and matrix products to TF32 on a GPU, or keep it from that.

    TF32 has 10 bits of mantissa, and tensor cores multiply it. By default torch allows it in convolutions only.
    """
    convolving, multiplying = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolving.allow_tf32, multiplying.allow_tf32
    convolving.allow_tf32, multiplying.allow_tf32 = convolutions, products
    try:
        yield
    finally:
        convolving.allow_tf32, multiplying.allow_tf32 = before


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest of several times: a limit is the best case."""
    work()
    times = []
    for _ in range(ROUNDS):
        start = now(device)
        work()
        times.append(now(device) - start)
    return min(times)
