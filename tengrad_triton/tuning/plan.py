"""The choice for every weight: by its measurements if a plan contains them, else by the cost model.

The cost model estimates the time of a step in flops: a weight gets explicit rows if that makes steps cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tengrad_triton.curvature.choices import STEP_KERNELS, Choice, Representation
from tengrad_triton.curvature.geometry import Geometry

MAX_BYTES = 4 * 2**30
_FASTER = 0.97  # another choice than the default needs less than this share of its time; smaller gains may be noise

Given = Representation | Mapping[str, Representation] | None
"""The representation that the user chose: one for all weights, or one for each of some weights, by their names."""


def representations_by_cost(
    geometries: Mapping[str, Geometry], given: Given, max_bytes: int, refresh_every: int
) -> dict[str, Representation]:
    """Return the representation of every weight by the cost model, except for those that are given.

    The cost model chooses ``per_sample`` if a step costs less with it, including the step's share of a refresh.
    If the chosen representations take more than ``max_bytes`` together, weights change to their smaller representation
    until they fit, first those that add the fewest flops for each byte. Steps are then slower, but still exact.
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
    return sum(geometry.stored_bytes(chosen[name]) for name, geometry in geometries.items())


@dataclass(frozen=True)
class Measured:
    """One representation of one geometry, measured on one device.

    Attributes:
        seconds: for each kernel that the representation needs, its time with each implementation: ``"torch"``,
            ``"triton"`` (infinite if it failed), or the name of another launch configuration.
        bytes: the bytes that J takes.
    """

    seconds: Mapping[str, Mapping[str, float]]
    bytes: int

    def per_step(self, refresh_every: int) -> float:
        """Return the seconds of a step with the fastest implementations, including the step's share of a refresh.

        Args:
            refresh_every: the number of steps that share the time of a refresh.
        """
        best = {kernel: times[_fastest_implementation(times)] for kernel, times in self.seconds.items()}
        return sum(t if kernel in STEP_KERNELS else t / refresh_every for kernel, t in best.items())

    @property
    def kernel_overrides(self) -> tuple[str, ...]:
        """Return the kernels that another implementation than Triton's default computes faster, as in `Choice`."""
        fastest = {k: _fastest_implementation(times) for k, times in self.seconds.items() if "triton" in times}
        others = {k: name for k, name in fastest.items() if name != "triton"}
        return tuple(sorted(k if name == "torch" else f"{k}:{name}" for k, name in others.items()))


def _fastest_implementation(times: Mapping[str, float]) -> str:
    """Return the fastest implementation of a kernel; Triton's default unless another one is clearly faster."""
    fastest = min(times, key=times.__getitem__)
    return fastest if "triton" not in times or times[fastest] < _FASTER * times["triton"] else "triton"


Measurements = Mapping[Representation, Measured]
"""The measured representations of one geometry."""


@dataclass(frozen=True)
class Plan:
    """Measurements of one device, made by `autotune`.

    Attributes:
        entries: for each geometry, by its key, the measured representations.
    """

    entries: Mapping[str, Measurements]

    def choose(
        self, geometries: Mapping[str, Geometry], given: Given, refresh_every: int, max_bytes: int
    ) -> dict[str, Choice]:
        """Return for every weight the choice with which steps are fastest and J fits into ``max_bytes``.

        If a geometry was not measured, the cost model decides. If the fastest representations take more than
        ``max_bytes`` together, weights change to a smaller representation until they fit, first those that lose the
        least time for each byte.

        Args:
            geometries: the sizes of every weight, by the weight's name.
            given: the representations that the user chose.
            refresh_every: the number of steps that share the time of a refresh.
            max_bytes: the memory for J, in bytes.

        Returns:
            the choice for every weight, by its name.
        """
        best = representations_by_cost(geometries, given, max_bytes, refresh_every)
        known = self._known(geometries)
        fixed = {name for name in geometries if given is not None and (isinstance(given, str) or name in given)}
        for name, measured in known.items():
            if measured and name not in fixed:
                best[name] = _fastest(measured, best[name], refresh_every)
        while _total(geometries, known, best) > max_bytes and (moves := self._moves(known, best, fixed, refresh_every)):
            _, name, smaller = min(moves)
            best[name] = smaller
        return {
            name: Choice(chosen, known[name][chosen].kernel_overrides if chosen in known[name] else ())
            for name, chosen in best.items()
        }

    def stored_bytes(self, geometries: Mapping[str, Geometry], chosen: Mapping[str, Representation]) -> int:
        """Return the bytes of all J: as measured, or else as the geometries say.

        Args:
            geometries: the sizes of every weight, by the weight's name.
            chosen: the representation of each of these weights.
        """
        return _total(geometries, self._known(geometries), chosen)

    def _known(self, geometries: Mapping[str, Geometry]) -> dict[str, Measurements]:
        return {name: self.entries.get(geometry.key, {}) for name, geometry in geometries.items()}

    @staticmethod
    def _moves(
        known: Mapping[str, Measurements], best: Mapping[str, Representation], fixed: set[str], refresh_every: int
    ) -> list[tuple[float, str, Representation]]:
        """Return every change of a weight to a smaller representation, with the seconds lost for each byte saved."""
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


def _fastest(measured: Measurements, by_cost: Representation, refresh_every: int) -> Representation:
    """Return the representation with the fastest mean step; ``by_cost`` unless another one is clearly faster."""
    times = {name: candidate.per_step(refresh_every) for name, candidate in measured.items()}
    fastest = min(times, key=times.__getitem__)
    stays = by_cost in times and times[fastest] >= _FASTER * times[by_cost]
    return by_cost if stays else fastest


def _total(
    geometries: Mapping[str, Geometry], known: Mapping[str, Measurements], chosen: Mapping[str, Representation]
) -> int:
    """Return the bytes of all J: as measured, or else as the geometries say."""
    return sum(
        known[name][one].bytes if one in known[name] else geometries[name].stored_bytes(one)
        for name, one in chosen.items()
    )
