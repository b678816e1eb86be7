"""The choice for every weight: by measurement where there is a plan, else by the analytic rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from tengrad_triton.curvature.choices import STEP_KERNELS, Choice, Representation
from tengrad_triton.curvature.geometry import Geometry

MAX_BYTES = 4 * 2**30
_FASTER = 0.97  # of the default's time; what is slower than this may only be faster by the noise of a timing

Given = Representation | Mapping[str, Representation] | None
"""The representation that a user gave for all weights, or for some by their names."""


def choose(
    geometries: Mapping[str, Geometry], given: Given, max_bytes: int, refresh_every: int
) -> dict[str, Representation]:
    """Return the representation of every weight by the analytic rule, except where one is given.

    The rule stores J_n where a step takes less time with it, including the step's share of a refresh. Where that takes
    more than ``max_bytes`` in all, weights change to their smaller representation until it fits, first those that lose
    the least time for each byte. A step gets slower then, and stays exact.
    """
    by_user = dict.fromkeys(geometries, given) if isinstance(given, str) else dict(given or {})
    chosen: dict[str, Representation] = {
        name: by_user.get(name, "per_sample" if geometry.saved_by_rows(refresh_every) > 0 else "factored")
        for name, geometry in geometries.items()
    }
    flops_lost: dict[str, float] = {}
    smaller: dict[str, Representation] = {}
    for name, geometry in geometries.items():
        saved = geometry.per_sample_bytes - geometry.factored_bytes
        smaller[name] = "factored" if saved > 0 else "per_sample"
        if saved and name not in by_user and chosen[name] != smaller[name]:
            flops_lost[name] = abs(geometry.saved_by_rows(refresh_every) / saved)
    for name in sorted(flops_lost, key=flops_lost.__getitem__):
        if total_bytes(geometries, chosen) <= max_bytes:
            break
        chosen[name] = smaller[name]
    return chosen


def total_bytes(geometries: Mapping[str, Geometry], chosen: Mapping[str, Representation]) -> int:
    """Return the bytes that the chosen representations store."""
    return sum(
        g.per_sample_bytes if chosen[name] == "per_sample" else g.factored_bytes for name, g in geometries.items()
    )


@dataclass(frozen=True)
class Measured:
    """One representation of one geometry, measured on one device.

    Attributes:
        seconds: the time of every kernel that it takes, by implementation: ``"torch"``, ``"triton"`` (infinite where it
            failed), or the name of another launch configuration.
        bytes: the bytes stored.
    """

    seconds: Mapping[str, Mapping[str, float]]
    bytes: int

    def per_step(self, refresh_every: int) -> float:
        """Return the seconds that a step takes with the fastest implementations, and its share of a refresh."""
        best = {kernel: times[_fastest_implementation(times)] for kernel, times in self.seconds.items()}
        return sum(t if kernel in STEP_KERNELS else t / refresh_every for kernel, t in best.items())

    @property
    def kernel_overrides(self) -> tuple[str, ...]:
        """Return the kernels for which another implementation than Triton's default is faster, as in `Choice`."""
        fastest = {k: _fastest_implementation(times) for k, times in self.seconds.items() if "triton" in times}
        return tuple(sorted(k if one == "torch" else f"{k}:{one}" for k, one in fastest.items() if one != "triton"))


def _fastest_implementation(times: Mapping[str, float]) -> str:
    """Return the fastest implementation of a kernel; Triton's default unless another one is clearly faster."""
    fastest = min(times, key=times.__getitem__)
    return fastest if "triton" not in times or times[fastest] < _FASTER * times["triton"] else "triton"


Measurements = Mapping[Representation, Measured]
"""The representations of one geometry that were measured."""


@dataclass(frozen=True)
class Plan:
    """Measurements of one device, made by `autotune`.

    Attributes:
        entries: for each geometry, by its key, the representations that were measured.
    """

    entries: Mapping[str, Measurements]

    def choose(
        self, geometries: Mapping[str, Geometry], given: Given, refresh_every: int, max_bytes: int
    ) -> dict[str, Choice]:
        """Return the choice for every weight that makes steps fastest within the memory.

        Where a geometry was not measured, the analytic rule decides. Where the fastest representations take more than
        ``max_bytes`` in all, weights change to a smaller one until it fits, first those that lose the least time for
        each byte.

        Args:
            geometries: the sizes of every weight, by name.
            given: representations that the user gave.
            refresh_every: the steps that share a refresh.
            max_bytes: the memory for J, in bytes.

        Warns:
            UserWarning: J takes more than ``max_bytes`` even in the smallest measured representations.
        """
        best = choose(geometries, given, max_bytes, refresh_every)
        known = {name: self.entries.get(geometry.key, {}) for name, geometry in geometries.items()}
        fixed = {name for name in geometries if given is not None and (isinstance(given, str) or name in given)}
        for name, measured in known.items():
            if measured and name not in fixed:
                best[name] = _fastest(measured, best[name], refresh_every)

        def used() -> int:
            return sum(_stored(geometries[name], known[name], one) for name, one in best.items())

        while used() > max_bytes and (moves := self._moves(known, best, fixed, refresh_every)):
            _, name, smaller = min(moves)
            best[name] = smaller
        if used() > max_bytes and len(fixed) < len(geometries):
            warnings.warn(
                f"J takes {used():,} bytes at least, and max_bytes is {max_bytes:,}: fewer rows (fisher_rows), rounded "
                "or compressed ones (representation) take less",
                stacklevel=2,
            )
        return {
            name: Choice(one, known[name][one].kernel_overrides if one in known[name] else ())
            for name, one in best.items()
        }

    @staticmethod
    def _moves(
        known: Mapping[str, Measurements], best: Mapping[str, Representation], fixed: set[str], refresh_every: int
    ) -> list[tuple[float, str, Representation]]:
        """Return every change to a smaller representation, with the seconds that it costs for each byte it saves."""
        moves = []
        for name, measured in known.items():
            if name in fixed or best[name] not in measured:
                continue
            now = measured[best[name]]
            for other, candidate in measured.items():
                if candidate.bytes < now.bytes:
                    slower = candidate.per_step(refresh_every) - now.per_step(refresh_every)
                    moves.append((slower / (now.bytes - candidate.bytes), name, other))
        return moves


def _fastest(measured: Measurements, by_rule: Representation, refresh_every: int) -> Representation:
    """Return the representation with the fastest mean step; the rule's unless another one is clearly faster."""
    times = {name: one.per_step(refresh_every) for name, one in measured.items()}
    fastest = min(times, key=times.__getitem__)
    stays = by_rule in times and times[fastest] >= _FASTER * times[by_rule]
    return by_rule if stays else fastest


def _stored(geometry: Geometry, measured: Measurements, chosen: Representation) -> int:
    if chosen in measured:
        return measured[chosen].bytes
    return geometry.factored_bytes if chosen == "factored" else geometry.per_sample_bytes
