"""The bytes that a process sends and holds: the cost model of docs/scaling.md.

Symbols: R processes with N_r samples each, N = R N_r; n ≤ N rows of J that are kept; L Fisher blocks; b = 4 bytes a
number; K = I O entries of a weight with I inputs, O outputs and P positions. A collective sends, in each process,

    all-gather of parts of s bytes             (R − 1) s
    reduce-scatter, or all-gather of S whole   (R − 1)/R S
    all-reduce of S bytes                      2 (R − 1)/R S

Source: doc/PERFORMANCE.md of NVIDIA's nccl-tests, whose "bus bandwidth" counts the same bytes. All sizes are in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from studies.processes.sizes import Sizes
from tengrad_triton.curvature.choices import Representation
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.tuning.budget import Budget, Chooser, Work
from tengrad_triton.tuning.plan import MAX_BYTES, Plan

NUMBER = 4  # bytes: curvature, parameters and gradients in float32
Way = Literal["DDP, global", "DDP, local", "FSDP2, global"]
"""How the model is wrapped, and whose rows the curvature has."""
WAYS: tuple[Way, ...] = ("DDP, global", "DDP, local", "FSDP2, global")


def gathered(part: float, count: int) -> float:
    """Return what a process sends in an all-gather: its part, to all others."""
    return (count - 1) * part


def reduced(whole: float, count: int) -> float:
    """Return what a process sends in an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * (count - 1) / count * whole


@dataclass(frozen=True)
class Sent:
    """The bytes that a process sends in one step.

    Attributes:
        wrapper: for gradients and parameters, in every step, whatever the optimizer.
        refresh: beside that, in a step that refreshes.
        reuse: beside that, in another step.
    """

    wrapper: float
    refresh: float
    reuse: float


@dataclass(frozen=True)
class Plans:
    """What a refresh of R processes keeps.

    Attributes:
        rows: n.
        why: the setting that bounds them; empty if all are kept.
        work: what the refresh could use, in one process: with ``shards`` its part of the outputs.
        sizes: the sizes of J with n rows, by parameter.
        chosen: how each is stored.
    """

    rows: int
    why: str
    work: Work
    sizes: dict[str, Geometry]
    chosen: dict[str, Representation]

    @property
    def j_bytes(self) -> int:
        """The bytes of J in one process."""
        return sum(g.stored_bytes(self.chosen[name]) for name, g in self.sizes.items())


def kept(
    sizes: Sizes, count: int, way: Way, fisher_rows: int | None = None, max_bytes: int = MAX_BYTES, every: int = 20
) -> Plans:
    """Return what a refresh keeps, by the optimizer's own budget and cost model (docs/math.md, M18).

    ``max_bytes`` bounds the J of weights in one process, whole or its part. The optimizer draws the rows after the
    exchange.
    """
    work = sizes.work(1 if way == "DDP, local" else count)
    if way == "FSDP2, global":
        work = replace(work, weights={name: g.of_part(count) for name, g in work.weights.items()})
    chooser = Chooser(Plan({}), None, sizes.contributions.explicit().keys(), every, max_bytes)
    spending = Budget(None, max_bytes, fisher_rows).spend(work, chooser)
    own = work.of_rows(spending.rows)
    return Plans(spending.rows, spending.why, work, own, dict(chooser.representations(own)))


def sent(sizes: Sizes, count: int, way: Way, rows: int, scatters: bool = True) -> Sent:
    """Return what a process sends, for R processes and n rows.

    Without ``scatters`` the library takes an all-reduce in place of a reduce-scatter, as torch does with gloo.

    DDP, global: the gradients are reduced; a refresh gathers contributions.
    DDP, local: every step reduces parameters and momenta too.
    FSDP2, global: two all-gathers of parameters and a reduce-scatter of gradients in every step; a refresh gathers
    contributions and reduces L Gram matrices; another step reduces J V and a square for each block, L (n + 1) numbers,
    and gathers the gradients of weights with a matrix for their outputs in D.
    """
    model = NUMBER * sizes.parameters
    exchange = gathered(sizes.message_bytes, count)
    blocks = len(sizes.layers)
    if way == "DDP, global":
        return Sent(reduced(model, count), exchange, 0.0)
    if way == "DDP, local":
        update = reduced(2 * model, count)
        return Sent(reduced(model, count), update, update)
    step = reduced(NUMBER * blocks * (rows + 1), count) + gathered(NUMBER * coupled_part(sizes, count), count)
    grams = reduced(NUMBER * blocks * rows**2, count)
    wrapper = (3 if scatters else 4) * gathered(NUMBER * part_of(sizes.shapes.values(), count), count)
    return Sent(wrapper, exchange + grams + step, step)


def part_of(shapes: Iterable[torch.Size], count: int) -> int:
    """Return the entries of parameters that a process has: ⌈O / R⌉ outputs of each; what is sent is filled up to that.

    `fully_shard` cuts like this, and the optimizer.
    """
    return sum(math.ceil(shape[0] / count) * shape[1:].numel() for shape in shapes)


def coupled_part(sizes: Sizes, count: int) -> int:
    """Return a process's entries of weights whose output side of D is a matrix: R⁻¹ V needs all outputs of V."""
    return part_of((sizes.shapes[name] for name, form in sizes.forms(count).items() if form.rows_are_matrices), count)


@dataclass(frozen=True)
class Held:
    """The bytes that a process holds.

    Attributes:
        training: parameters, gradients and momenta, as with SGD; without what forward keeps.
        curvature: J and the inverse factors of L blocks, L n² numbers, from a refresh to the next.
        messages: during the exchange: the message of every process, R s, its own, and what that was made from.
        contributions: what J is made from: of all processes, copied from the messages, and once if layers share it.
    """

    training: float
    curvature: float
    messages: float
    contributions: float

    @property
    def peak(self) -> float:
        """The bytes during a refresh: messages are freed before J and K are made, and the old J before forward."""
        return self.training + self.contributions + max(self.messages, self.curvature)


def held(sizes: Sizes, count: int, way: Way, plans: Plans) -> Held:
    """Return what a process holds. D, which has no more than 128² numbers for a side, is left out.

    With FSDP2 it has its part of parameters, gradients and momenta, and during a refresh whole parameters too.
    """
    model, curvature = NUMBER * sizes.parameters, plans.j_bytes + NUMBER * len(sizes.layers) * plans.rows**2
    training = 3 * model / count + model if way == "FSDP2, global" else 3 * model
    if way == "DDP, local" or count == 1:
        return Held(training, curvature, 0, sizes.message_bytes)
    return Held(training, curvature, (count + 2) * sizes.message_bytes, count * sizes.message_bytes)


def first_above(limit: float, of_count: Callable[[int], float], most: int = 4096) -> int | None:
    """Return the smallest power of two up to ``most`` for which a quantity exceeds a limit; None if none does."""
    counts = (2**power for power in range(int(math.log2(most)) + 1))
    return next((count for count in counts if of_count(count) > limit), None)
