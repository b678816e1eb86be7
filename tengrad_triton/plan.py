"""Which representation serves which layer: the analytic rule.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Representation = Literal["factored", "per_sample", "per_sample_bf16", "compressed"]
REPRESENTATIONS: tuple[Representation, ...] = ("factored", "per_sample", "per_sample_bf16", "compressed")
MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Choice:
    """How one weight's J is stored, and which of its kernels PyTorch does better."""

    representation: Representation
    torch_for: tuple[str, ...] = ()


Chosen = Mapping[str, Choice]
"""Every weight's choice, by its full name."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of one weight's outer products Σ_p g_np a_npᵀ, and what its two representations cost."""

    samples: int
    groups: int
    positions: int
    inputs: int
    outputs: int
    itemsize: int
    factored_bytes: int

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


def choose(
    geometries: Mapping[str, Geometry], by_hand: Representation | Mapping[str, Representation] | None, max_bytes: int
) -> dict[str, Representation]:
    """Return the representation of every weight: by hand where given, else the cheaper one within the memory.

    The rule stores J_n where it is the cheaper way to the Gram matrix. Where all that would take more than
    ``max_bytes``, the weights that save the most go back to their factors first: the step gets slower, never wrong.
    """
    given = dict.fromkeys(geometries, by_hand) if isinstance(by_hand, str) else dict(by_hand or {})
    chosen: dict[str, Representation] = {
        name: given.get(name, "per_sample" if geometry.prefers_rows else "factored")
        for name, geometry in geometries.items()
    }
    saving = {name: g.per_sample_bytes - g.factored_bytes for name, g in geometries.items()}
    for name in sorted(saving, key=lambda name: -saving[name]):
        if saving[name] <= 0 or total_bytes(geometries, chosen) <= max_bytes:
            break
        if name not in given:
            chosen[name] = "factored"
    return chosen


def total_bytes(geometries: Mapping[str, Geometry], chosen: Mapping[str, Representation]) -> int:
    """Return what the chosen representations store."""
    return sum(
        g.per_sample_bytes if chosen[name] == "per_sample" else g.factored_bytes for name, g in geometries.items()
    )
