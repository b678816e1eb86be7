"""The sizes of one weight's outer products, and what each representation of its J costs.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tengrad_triton.curvature.choices import Representation
from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, OuterProducts, PerSampleGrads, flatten_rows

EMBEDDING = "embedding"
"""The layout of an embedding. Plans do not cover it."""
_FLOPS_PER_BYTE = {"cpu": 8, "cuda": 11}
"""Flops in the time of moving a byte, by the type of device. Steps from rows are faster with P > 2 × this (M4).

On two cores 5.5 were measured; 8 prefers the factors, which are smaller, where both take about as long. On an H100 or
H200 it is estimated: 50 to 65 % of 67 Tflop/s in float32, and 90 % of 3.35 or 4.8 TB/s, give 8 to 15.
"""


@dataclass(frozen=True)
class Geometry:
    """The sizes of one weight's outer products Σ_p g_np a_npᵀ, and what its two representations cost.

    Attributes:
        samples: N, the rows of J.
        groups: G.
        positions: P.
        inputs: I of a group.
        outputs: O of a group; for an embedding the number of its rows in memory, V.
        itemsize: bytes of an entry.
        factored_bytes: what storing the factors a and g takes.
        layout: what else a kernel's time depends on: ``"dense"``, `EMBEDDING`, or a convolution's kernel, stride,
            padding, dilation and image.
        device: the type of the device, such as ``"cuda"``.
    """

    samples: int
    groups: int
    positions: int
    inputs: int
    outputs: int
    itemsize: int
    factored_bytes: int
    layout: str
    device: str

    @property
    def key(self) -> str:
        """Return the name under which a plan keeps this geometry."""
        sizes = f"N{self.samples} G{self.groups} P{self.positions} I{self.inputs} O{self.outputs}"
        return f"{sizes} {self.layout} {8 * self.itemsize}-bit"

    def of_part(self, parts: int) -> Geometry:
        """Return the sizes in the first of some processes among which the outputs are cut; all have its inputs."""
        if parts == 1:
            return self
        outputs = max(1, -(-self.outputs // parts))
        cut = 0 if self.layout == EMBEDDING else self.samples * self.groups * self.positions * (self.outputs - outputs)
        return replace(self, outputs=outputs, factored_bytes=max(0, self.factored_bytes - cut * self.itemsize))

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
    def prefers_explicit_rows(self) -> bool:
        """Whether K is cheaper from explicit rows: for most convolutions it is, for most linear layers it is not."""
        return self.row_flops < self.pair_flops

    @property
    def entries(self) -> int:
        """Return the entries of the weight: G I O."""
        return self.groups * self.inputs * self.outputs

    def flops_of_pass(self, size: int) -> int:
        """Return the flops in the time of moving ``size`` bytes."""
        return size * _FLOPS_PER_BYTE.get(self.device, _FLOPS_PER_BYTE["cuda"])

    def stored_bytes(self, representation: Representation) -> int:
        """Return the most that a representation stores; ``"compressed"`` may drop rows."""
        if representation == "factored":
            return self.factored_bytes
        return self.per_sample_bytes // (2 if representation == "per_sample_bf16" else 1)

    def step_flops(self, representation: Representation) -> int:
        """Return the cost of a step's two products with J: 2 G N P I O flops each from factors, and a pass over J."""
        lookup = self.layout == EMBEDDING or representation != "factored"  # both forms of an embedding look ids up
        products = 0 if lookup else 4 * self.samples * self.positions * self.entries
        return products + 2 * self.flops_of_pass(self.stored_bytes(representation))

    def refresh_flops(self, representation: Representation) -> int:
        """Return the cost of K, and of rows where they are stored, which are written and read once more."""
        if self.layout == EMBEDDING or representation == "factored":
            return min(self.pair_flops, self.row_flops)
        return self.row_flops + 2 * self.flops_of_pass(self.stored_bytes(representation))

    def saved_by_rows(self, refresh_every: int) -> float:
        """Return how many flops a step saves with explicit rows instead of factors.

        The cost of a refresh is divided among ``refresh_every`` steps.
        """
        saved = self.step_flops("factored") - self.step_flops("per_sample")
        if self.layout == EMBEDDING:
            return float(saved)
        return saved + (self.refresh_flops("factored") - self.refresh_flops("per_sample")) / refresh_every


@dataclass(frozen=True)
class Spending:
    """What the budget pays for, by the cost model.

    Attributes:
        rows: the rows of J; a smaller batch may have fewer.
        of: the rows of the largest batch so far.
        step: what every step adds to SGD's, as a share of it.
        refresh: what a refresh adds to a step, as a share of SGD's step.
        interval: the steps that a refresh has to serve for so that it stays within ``step_share``; 1 without one.
        why: the setting that bounds the rows; empty if all are kept.
    """

    rows: int
    of: int
    step: float
    refresh: float
    interval: int
    why: str

    def __str__(self) -> str:
        kept = f"{self.rows} of {self.of} rows{f' ({self.why})' if self.why else ''}"
        costs = f"by the cost model a step adds {self.step:.2f} of SGD's time, a refresh {self.refresh:.2f}"
        return f"{kept}; {costs}" + (f", to be shared by {self.interval} steps" if self.interval > 1 else "")


def geometry_of(outer: OuterProducts) -> Geometry:
    """Return the sizes of one call's outer products."""
    n, groups, positions, outputs = outer.g_NGPO.shape
    a, itemsize = outer.a, max(4, outer.g_NGPO.itemsize)  # half precision is stored in float32
    if isinstance(a, ConvInput):
        conv = a.geometry
        sizes = f"{a.kernel_size} stride {conv.stride} padding {conv.padding} dilation {conv.dilation}"
        layout = f"conv {sizes} of {list(a.x_NCHW.shape[2:])}"
        inputs, stored = a.inputs, a.x_NCHW.numel()
    else:
        layout, inputs, stored = "dense", a.shape[-1], a.numel()
    stored, device = itemsize * (stored + outer.g_NGPO.numel()), outer.g_NGPO.device.type
    return Geometry(n, groups, positions, inputs, outputs, itemsize, stored, layout, device)


def geometry_of_rows(rows: PerSampleGrads) -> Geometry:
    """Return the sizes of rows that are given, as those of a layer with one input and one position."""
    j_NK = flatten_rows(rows.j_NK)
    n, entries = j_NK.shape
    itemsize = max(4, j_NK.itemsize)
    return Geometry(n, 1, 1, 1, entries, itemsize, n * entries * itemsize, "rows", j_NK.device.type)


def geometry_of_calls(calls: Sequence[Contribution]) -> Geometry | None:
    """Return the sizes of one micro-batch's calls; None where rows are explicit, which leaves no choice."""
    if any(isinstance(call, PerSampleGrads) for call in calls):
        return None
    outers = [geometry_of(call) for call in calls if isinstance(call, OuterProducts)]
    embeddings = [call for call in calls if isinstance(call, EmbeddingGrads)]
    if not embeddings:
        return outers[0]
    n, _, entries = embeddings[0].g_NPD.shape
    positions = sum(call.ids_NP.shape[1] for call in embeddings)
    stored = sum(call.ids_NP.nbytes + call.g_NPD.nbytes for call in embeddings)
    stored += sum(outer.factored_bytes for outer in outers)
    itemsize, device = embeddings[0].g_NPD.itemsize, embeddings[0].g_NPD.device.type
    return Geometry(n, 1, positions, entries, embeddings[0].num_embeddings, itemsize, stored, EMBEDDING, device)
