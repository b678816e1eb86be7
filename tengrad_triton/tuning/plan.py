"""Which representation and kernels serve which weight: by measurement where there is a plan, else by the analytic rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from tengrad_triton.curvature.choices import STEP_KERNELS, Choice, Representation
from tengrad_triton.curvature.geometry import Geometry

MAX_BYTES = 4 * 2**30
_NOTICEABLE = 0.97  # of the incumbent's time, below which a rival is faster by more than timings scatter


def choose(
    geometries: Mapping[str, Geometry],
    by_hand: Representation | Mapping[str, Representation] | None,
    max_bytes: int,
    refresh_every: int = 100,
) -> dict[str, Representation]:
    """Return the representation of every weight: by hand where given, else the cheaper one within the memory.

    The rule stores J_n where a step costs less with it, its share of a refresh included. Where all that would take more
    than ``max_bytes``, the weights that lose the least for each byte take what is smaller first: the step gets slower,
    never wrong.
    """
    given = dict.fromkeys(geometries, by_hand) if isinstance(by_hand, str) else dict(by_hand or {})
    chosen: dict[str, Representation] = {
        name: given.get(name, "per_sample" if geometry.rows_save(refresh_every) > 0 else "factored")
        for name, geometry in geometries.items()
    }
    lost: dict[str, float] = {}
    smaller: dict[str, Representation] = {}
    for name, geometry in geometries.items():
        saved = geometry.per_sample_bytes - geometry.factored_bytes
        smaller[name] = "factored" if saved > 0 else "per_sample"
        if saved and name not in given and chosen[name] != smaller[name]:
            lost[name] = abs(geometry.rows_save(refresh_every) / saved)
    for name in sorted(lost, key=lost.__getitem__):
        if total_bytes(geometries, chosen) <= max_bytes:
            break
        chosen[name] = smaller[name]
    return chosen


def total_bytes(geometries: Mapping[str, Geometry], chosen: Mapping[str, Representation]) -> int:
    """Return what the chosen representations store."""
    return sum(
        g.per_sample_bytes if chosen[name] == "per_sample" else g.factored_bytes for name, g in geometries.items()
    )


@dataclass(frozen=True)
class Measured:
    """One representation of one geometry on one device.

    Attributes:
        seconds: of every kernel that it takes, by who runs it: ``"torch"``, ``"triton"`` (infinite where it failed) or,
            by its name, another of the kernel's launch configurations.
        bytes: what it stores.
    """

    seconds: Mapping[str, Mapping[str, float]]
    bytes: int

    def per_step(self, refresh_every: int) -> float:
        """Return the seconds a step, each kernel by whoever is faster, a refresh shared by the steps that use it."""
        best = {kernel: times[_fastest_of(times)] for kernel, times in self.seconds.items()}
        return sum(t if kernel in STEP_KERNELS else t / refresh_every for kernel, t in best.items())

    @property
    def kernel_overrides(self) -> tuple[str, ...]:
        """Return the kernels that PyTorch does better than Triton, and those that another configuration does."""
        by = {kernel: _fastest_of(times) for kernel, times in self.seconds.items() if "triton" in times}
        named = {
            kernel: kernel if who == "torch" else f"{kernel}:{who}" for kernel, who in by.items() if who != "triton"
        }
        return tuple(sorted(named.values()))


def _fastest_of(times: Mapping[str, float]) -> str:
    """Return who runs a kernel: Triton as it is, unless a rival is more than the noise of a timing faster."""
    fastest = min(times, key=times.__getitem__)
    return fastest if "triton" not in times or times[fastest] < _NOTICEABLE * times["triton"] else "triton"


Measurements = Mapping[Representation, Measured]


@dataclass(frozen=True)
class Plan:
    """What was measured on one device: for each geometry, by its key, each representation that was tried."""

    entries: Mapping[str, Measurements]

    def choose(
        self,
        geometries: Mapping[str, Geometry],
        by_hand: Representation | Mapping[str, Representation] | None,
        refresh_every: int,
        max_bytes: int,
    ) -> dict[str, Choice]:
        """Return the fastest choice for every weight within the memory; the analytic rule where nothing was measured.

        Where the fastest ones take more than ``max_bytes``, the weights that lose the least time for each byte saved
        change to a smaller representation first.
        """
        analytic = choose(geometries, by_hand, max_bytes, refresh_every)
        known = {name: self.entries.get(geometry.key, {}) for name, geometry in geometries.items()}
        fixed = {name for name in geometries if by_hand is not None and (isinstance(by_hand, str) or name in by_hand)}
        best = dict(analytic)
        for name, measured in known.items():
            if measured and name not in fixed:
                best[name] = _fastest(measured, analytic[name], refresh_every)

        def used() -> int:
            return sum(_stored(geometries[name], known[name], choice) for name, choice in best.items())

        while used() > max_bytes and (moves := self._savings(known, best, fixed, refresh_every)):
            _, name, smaller = min(moves)
            best[name] = smaller
        if used() > max_bytes and len(fixed) < len(geometries):
            warnings.warn(
                f"J takes {used():,} bytes at least, and max_bytes is {max_bytes:,}: fewer rows (fisher_rows), rounded "
                "or compressed ones (representation) take less",
                stacklevel=2,
            )
        return {
            name: Choice(choice, known[name][choice].kernel_overrides if choice in known[name] else ())
            for name, choice in best.items()
        }

    @staticmethod
    def _savings(
        known: Mapping[str, Measurements], best: Mapping[str, Representation], fixed: set[str], refresh_every: int
    ) -> list[tuple[float, str, Representation]]:
        """Return every change to a smaller representation, with the seconds that it costs for each byte it saves."""
        moves = []
        for name, measured in known.items():
            if name in fixed or best[name] not in measured:
                continue
            now = measured[best[name]]
            for other, rival in measured.items():
                if rival.bytes < now.bytes:
                    slower = rival.per_step(refresh_every) - now.per_step(refresh_every)
                    moves.append((slower / (now.bytes - rival.bytes), name, other))
        return moves


def _fastest(measured: Measurements, incumbent: Representation, refresh_every: int) -> Representation:
    """Return the representation with the fastest mean step; the rule's, unless a rival is noticeably faster."""
    times = {name: one.per_step(refresh_every) for name, one in measured.items()}
    fastest = min(times, key=times.__getitem__)
    stays = incumbent in times and times[fastest] >= _NOTICEABLE * times[incumbent]
    return incumbent if stays else fastest


def _stored(geometry: Geometry, measured: Measurements, choice: Representation) -> int:
    if choice in measured:
        return measured[choice].bytes
    return geometry.factored_bytes if choice == "factored" else geometry.per_sample_bytes
