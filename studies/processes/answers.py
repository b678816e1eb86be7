"""What the page answers from the cost model: where processes add too much to a step, and how many rows do not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from studies.processes.hardware import MEMORY
from studies.processes.model import Plans, Sent, Way, first_above, held, kept, sent
from studies.processes.sizes import sizes_of
from studies.processes.times import TIMED, Host, Times, times_of
from tengrad_triton.optim.interval import Growing
from tengrad_triton.tuning.budget import largest_that

COUNTS = (8, 64, 512, 4096)
SAMPLES = (32, 128)
INTERVALS = (Growing().most, 100)
"""T: the longest interval of the default, and that of the paper."""
ADDED = 0.15
"""The share of SGD's step that many processes may add to TENGraD's mean step in one process."""
FEW_ROWS = 64
"""`fisher_rows` in the figure and in the table of refreshes: as many as the page advises."""


class Answers:
    """The cost model with the host's measured seconds.

    Args:
        host: the host's seconds.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.times = cache(self._times)

    def _times(self, name: str, samples: int, count: int, way: Way, fisher_rows: int | None = None) -> Times:
        return times_of(name, samples, count, way, self._host, fisher_rows)

    def over_sgd(
        self, name: str, samples: int, count: int, way: Way, every: int, fisher_rows: int | None = None
    ) -> float:
        """Return the mean step over SGD's."""
        return self.times(name, samples, count, way, fisher_rows).over_sgd(every)

    def limit(self, name: str, samples: int, every: int) -> float:
        """Return the most that a mean step may take, over SGD's: that of one process, and `ADDED`."""
        return self.over_sgd(name, samples, 1, "DDP, global", every) + ADDED

    def last(self, name: str, samples: int, way: Way, every: int) -> int:
        """Return the largest power of two of processes, up to 4096, within the limit with all rows."""
        limit = self.limit(name, samples, every)
        first = first_above(limit, lambda count: self.over_sgd(name, samples, count, way, every))
        return COUNTS[-1] if first is None else first // 2

    def most_rows(self, name: str, samples: int, count: int, every: int) -> int:
        """Return the most rows within the limit, with `DistributedDataParallel`; 0 if not even one row is."""
        limit = self.limit(name, samples, every)

        def fits(rows: int) -> bool:
            return self.over_sgd(name, samples, count, "DDP, global", every, rows) <= limit

        return largest_that(kept(sizes_of(name, samples), count, "DDP, global").rows, fits)

    def all_most_rows(self, count: int, every: int, samples: int) -> list[int]:
        """Return `most_rows` of every model."""
        return [self.most_rows(name, samples, count, every) for name in TIMED]


@cache
def plans_of(name: str, samples: int, count: int, way: Way) -> Plans:
    """Return what a refresh keeps by default."""
    return kept(sizes_of(name, samples), count, way)


def sent_by(name: str, samples: int, count: int, way: Way) -> Sent:
    """Return what a process sends by default."""
    return sent(sizes_of(name, samples), count, way, plans_of(name, samples, count, way).rows)


def fits_memory(name: str, samples: int, count: int, way: Way) -> bool:
    """Return whether the peak of a refresh fits into an H200, without what forward keeps."""
    return held(sizes_of(name, samples), count, way, plans_of(name, samples, count, way)).peak <= MEMORY


def powers(most: int = COUNTS[-1]) -> Iterator[int]:
    """Yield 1, 2, 4, …, up to ``most``."""
    count = 1
    while count <= most:
        yield count
        count *= 2


def last_that_fits(name: str, samples: int, way: Way) -> int:
    """Return the largest power of two of processes whose refresh fits into memory; 0 if one alone does not."""
    return max((count for count in powers() if fits_memory(name, samples, count, way)), default=0)
