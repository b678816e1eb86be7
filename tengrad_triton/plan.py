"""Which representation and kernels serve which layer: by measurement where there is a plan, else by the analytic rule.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Representation = Literal["factored", "per_sample", "per_sample_bf16", "compressed"]
REPRESENTATIONS: tuple[Representation, ...] = ("factored", "per_sample", "per_sample_bf16", "compressed")
MAX_BYTES = 4 * 2**30
_NOTICEABLE = 0.97  # of the incumbent's time, below which a rival is faster by more than timings scatter
_FLOPS_PER_BYTE = 8  # arithmetic in the time of moving a byte: 5.5 on two cores (where rows cost memory), 20 on a GPU


@dataclass(frozen=True)
class Choice:
    """How one weight's J is stored, and which kernels PyTorch does better, or another configuration (``:tile``)."""

    representation: Representation
    torch_for: tuple[str, ...] = ()


def served_by(torch_for: Iterable[str]) -> dict[str, str]:
    """Return who serves a kernel, by its name, where Triton's default does not: ``kernel:torch`` or ``kernel:tile``."""
    named = (name if ":" in name else f"{name}:torch" for name in torch_for)
    return {name.partition(":")[0]: name for name in named}


Chosen = Mapping[str, Choice]
"""Every weight's choice, by its full name."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of one weight's outer products Σ_p g_np a_npᵀ, and what its two representations cost.

    ``layout`` names what else a kernel's time depends on: a convolution's kernel, stride and dilation, or that it is a
    table of O rows that are looked up.
    """

    samples: int
    groups: int
    positions: int
    inputs: int
    outputs: int
    itemsize: int
    factored_bytes: int
    layout: str = "dense"

    @property
    def key(self) -> str:
        """Return the name under which a plan keeps this geometry."""
        sizes = f"N{self.samples} G{self.groups} P{self.positions} I{self.inputs} O{self.outputs}"
        return f"{sizes} {self.layout} {8 * self.itemsize}-bit"

    @property
    def pair_flops(self) -> int:
        """Return the cost of K from pairs of positions: 2 G N² P² (I + O) (paper, Corollary 2)."""
        return 2 * self.groups * (self.samples * self.positions) ** 2 * (self.inputs + self.outputs)

    @property
    def row_flops(self) -> int:
        """Return the cost of K from explicit per-sample gradients: 2 G N P I O to make them, 2 G N² I O for J Jᵀ."""
        return 2 * self.groups * self.samples * (self.positions + self.samples) * self.inputs * self.outputs

    @property
    def per_sample_bytes(self) -> int:
        """Return what storing J_n for every sample takes."""
        return self.samples * self.groups * self.inputs * self.outputs * self.itemsize

    @property
    def prefers_rows(self) -> bool:
        """Whether explicit per-sample gradients are the cheaper way to K: nearly every convolution, no plain linear."""
        return self.row_flops < self.pair_flops

    def rows_save(self, refresh_every: int) -> float:
        """Return how much less a step costs with explicit rows than with factors, in flops; a refresh is shared out.

        Either way takes two products a step: 2 G N P I O flops each from factors, a pass over all J from rows.
        """
        if self.layout == "table":  # looked up either way: what is smaller is cheaper
            return float(self.factored_bytes - self.per_sample_bytes)
        products = 4 * self.groups * self.samples * self.positions * self.inputs * self.outputs
        factored = products + 2 * _FLOPS_PER_BYTE * self.factored_bytes
        rows = 2 * _FLOPS_PER_BYTE * self.per_sample_bytes
        way_to_gram = min(self.pair_flops, self.row_flops) - self.row_flops - rows  # J is written and read once more
        return factored - rows + way_to_gram / refresh_every


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


Product = Literal["gram", "project", "expand"]
Kernels = Mapping[Product, Sequence[str]]
"""What each product is made of, the usual one first."""
ROW_KERNELS: Kernels = {"gram": ("gram_rows",), "project": ("project_rows",), "expand": ("expand_rows_update_",)}
FACTOR_KERNELS: Kernels = {
    "gram": ("gram", "gram_rows", "sample_grads", "conv_sample_grads"),
    "project": ("project",),
    "expand": ("expand_update_",),
}
WINDOW_KERNELS: Kernels = {
    **FACTOR_KERNELS,
    "project": ("project_conv",),
    "expand": ("expand_conv_update_",),
}

STEP_KERNELS = frozenset(
    name
    for kernels in (ROW_KERNELS, FACTOR_KERNELS, WINDOW_KERNELS)
    for product in ("project", "expand")
    for name in kernels[product]
)
"""The kernels that every step runs; the others run when the curvature is refreshed."""


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
    def torch_for(self) -> tuple[str, ...]:
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
            name: Choice(choice, known[name][choice].torch_for if choice in known[name] else ())
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
