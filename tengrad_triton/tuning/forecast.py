"""What a refresh with many rows of J will take, in bytes and seconds, before it is made (docs/math.md, M18).

The flops are those of the cost model. How fast this device computes them is measured by a product of small matrices and
by a small factorization.

Dimensions: R rows of J, n rows of one block's K.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.kernels.cholesky import LARGEST_BATCHED
from tengrad_triton.tuning.budget import Formed, Work, largest_that

_GIB = 2**30
_MATRICES = 3  # K, its factor C and C⁻¹ are in memory together
_WORTH_MEASURING = 5 * 10**9  # flops: fewer take less than a second
_MOST_SECONDS = 1.0  # that go without saying
_PROBE_SECONDS, _PROBES, _REPEATS = 0.02, (1024, 2048, 4096), 5


@dataclass(frozen=True)
class Forecast:
    """What each refresh takes.

    Attributes:
        rows: R, of all refreshes that are kept.
        bytes: of all K, their factors and the inverses of these.
        seconds: of the refresh, beyond a step that reuses the curvature.
        by_rows: the part of ``seconds`` that one row for each sample would not take, and the factorizations.
    """

    rows: int
    bytes: int
    seconds: float
    by_rows: float


class Forecaster:
    """Foresees the refreshes of an optimizer, for any number of rows.

    Args:
        work: what a refresh could use, all rows of it.
        blocks: the full names of the parameters of every Fisher block.
        formed: returns the sizes and representations for a number of rows.
        ops: the kernels.
        device: on which the refreshes run.
    """

    def __init__(
        self, work: Work, blocks: Sequence[Sequence[str]], formed: Formed, ops: Ops,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._work, self._blocks, self._formed, self._ops, self._device = work, blocks, formed, ops, device
        itemsize = max((g.itemsize for g in work.weights.values()), default=4)
        self._like = torch.empty(0, dtype=torch.float64 if itemsize == 8 else torch.float32, device=device)

    def report(self, rows: int) -> str | None:
        """Return what to say of refreshes that keep ``rows`` rows each; None if they take no long time for them.

        Raises:
            ValueError: the K of the blocks do not fit into memory.
        """
        if self._flops_by_rows(rows) < _WORTH_MEASURING:
            return None
        self._check_memory(rows)
        found = self.at(rows)
        if found.by_rows <= _MOST_SECONDS:
            return None
        fewer = largest_that(rows, lambda r: self.at(r).by_rows <= _MOST_SECONDS)
        advice = f" (up to about {fewer:,} add less than a second)" if fewer else ""
        return (
            f"J has {found.rows:,} rows: each refresh will take about {found.seconds:.2g} s on this device "
            f"({found.by_rows:.2g} s because of so many rows) and {found.bytes / _GIB:.2g} GiB for K and its factors; "
            f"fisher_rows= keeps fewer rows{advice}, refresh_every= refreshes less often"
        )

    def at(self, rows: int) -> Forecast:
        """Return what a refresh takes that keeps so many rows."""
        (sizes, chosen), (sides, reduction) = self._formed(rows), self._sides_of_k(rows)
        measured, seconds_of_one = self._factoring
        factoring = sum((n / measured) ** 3 for n in sides) * seconds_of_one
        flops = self._work.refresh(0, sizes, chosen) + reduction
        seconds, of_gram = (x / self._flops_per_second for x in (flops, self._flops_of_larger_k(rows)))
        return Forecast(rows * self._work.history, self._bytes(rows), factoring + seconds, factoring + of_gram)

    def _bytes(self, rows: int) -> int:
        return _MATRICES * self._like.itemsize * sum(n * n for n in self._sides_of_k(rows)[0])

    def _sides_of_k(self, rows: int) -> tuple[list[int], float]:
        """Return n of every block, and the flops by which its reduction (M12) changes those of K."""
        (sizes, chosen), whole = self._formed(rows), rows * self._work.history
        may_reduce = self._work.history == 1 and (self._device.type == "cpu" or whole > LARGEST_BATCHED)
        sides, flops = [], 0.0
        for names in self._blocks:
            n = sum(sizes[name].entries for name in names)
            if may_reduce and n < whole and all(chosen[name] == "per_sample" for name in names):
                sides.append(n)
                flops += 2.0 * n * (n * whole + n**2 - whole**2)
            else:
                sides.append(whole)
        return sides, flops

    def _flops_of_larger_k(self, rows: int) -> float:
        """Return the flops of K beyond those with one row for each sample."""
        least = min(rows, self._work.samples // self._work.history)
        many, few = (
            sum(g.refresh_flops(chosen[name]) for name, g in sizes.items())
            for sizes, chosen in (self._formed(rows), self._formed(least))
        )
        return max(0.0, many - few + self._sides_of_k(rows)[1])

    def _flops_by_rows(self, rows: int) -> float:
        return sum(float(n) ** 3 for n in self._sides_of_k(rows)[0]) + self._flops_of_larger_k(rows)

    def _check_memory(self, rows: int) -> None:
        there = memory_of(self._device)
        if (needed := self._bytes(rows)) <= there:
            return
        fitting, count = largest_that(rows, lambda r: self._bytes(r) <= there), len(self._blocks)
        blocks = f"{count} {'block' if count == 1 else 'blocks'}"
        raise ValueError(
            f"J would have {rows * self._work.history:,} rows: K of {blocks}, its factors and their "
            f"inverses would take {needed / _GIB:,.1f} GiB, but there are {there / _GIB:,.1f} GiB; set fisher_rows= to "
            f"keep fewer rows (at most {fitting:,} fit)"
        )

    @cached_property
    def _factoring(self) -> tuple[int, float]:
        """Return the size of a small matrix, and the seconds that factoring it takes."""

        def factored(n: int) -> None:
            k_1NN = torch.eye(n, dtype=self._like.dtype, device=self._device).unsqueeze(0)
            self._ops.cholesky_inverse(self._ops.cholesky(k_1NN, self._like.new_ones(1))[0])

        return self._measured(factored)

    @cached_property
    def _flops_per_second(self) -> float:
        n, seconds = self._measured(lambda n: self._like.new_ones(n, n) @ self._like.new_ones(n, n))
        return 2 * n**3 / seconds

    def _measured(self, call: Callable[[int], object]) -> tuple[int, float]:
        """Return the smallest size for which a call takes some time, and its seconds."""
        size, seconds = _PROBES[0], 0.0
        for size in _PROBES:
            seconds = self._seconds(partial(call, size))
            if seconds > _PROBE_SECONDS:
                break
        return size, seconds

    def _seconds(self, call: Callable[[], object]) -> float:
        """Return the median seconds of a call, after one that may load a library."""
        times = []
        for _ in range(1 + _REPEATS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def memory_of(device: torch.device) -> float:
    """Return the bytes that this process can have on a device at most; infinity if that is not known.

    On a CPU, memory that the process has already is counted too, because a part of it is free again.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    there = float("inf")
    with suppress(OSError, ValueError):  # only Linux has these files
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        there = float(available + pages * 4096)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            there = min(there, float(Path("/sys/fs/cgroup", limit).read_text(encoding="ascii")))
    return there
