"""The sizes of one weight's outer products, and what each representation of its J costs.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOPS_PER_BYTE = 8  # arithmetic in the time of moving a byte: 5.5 on two cores (where rows cost memory), 20 on a GPU


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
