# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums over the parts of weights and over the weights of Fisher blocks, for the ops that project.

A kernel divides the weight of each entry into parts and stores a partial sum for each. A second kernel adds them in a
fixed order, so that the result is the same in every run.

Dimensions: L Fisher blocks, N samples, P positions, S slots, each of which holds a partial sum for N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launches import Launch, dtype_examples_of
from .pointer_table import FIRST_TILE, MAX_ENTRIES, Columns, Entries, Table, fields, number, starts
from .spec import Config, Repeated, cdiv, single_config, tiling, tl, triton

# The index of the Fisher block; the numbers of samples and of positions; SLOTS, how many partial sums each sample of an
# entry has; and FIRST_SLOT, how many slots the entries before it have.
FISHER_BLOCK, SAMPLES, POSITIONS, SLOTS, FIRST_SLOT = fields(5, after=1)
AFTER_PARTIAL_SUMS = 6  # one more than the index of the last of these


@triton.jit
def store_partial_sums(table_ptr, part_ptr, sums, part, entry, tile, ENTRIES, WIDTH, BLOCK_R: tl.constexpr):
    """Add the sums of one part of an entry over the positions of each sample, and store them in the part's slots.

    ``sums`` has one number for each of BLOCK_R pairs of a sample and a position, numbered through all samples; ``tile``
    is the index of these pairs among all. The pairs of one sample may begin in one tile and end in a later one, so that
    a part has a slot for each tile that they may reach. A slot that they do not reach gets zero.
    """
    P = number(table_ptr, POSITIONS, entry, ENTRIES)
    slots = 1 + tl.cdiv(P - 1, BLOCK_R)
    pair = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tile * BLOCK_R // P + tl.arange(0, BLOCK_R)  # the samples that may have pairs in the tile
    sums = tl.sum(tl.where((pair // P)[:, None] == n[None, :], sums[:, None], 0.0), 0)
    slot = tile - n * P // BLOCK_R
    at = (number(table_ptr, FIRST_SLOT, entry, ENTRIES) + part * slots + slot).to(tl.int64) * WIDTH + n
    inside = (n < WIDTH) & (n * P < (tile + 1) * BLOCK_R)
    tl.store(part_ptr + at, sums, mask=inside)
    is_last = (n + 1) * P <= (tile + 1) * BLOCK_R
    tl.store(part_ptr + at + WIDTH, tl.zeros((BLOCK_R,), tl.float32), mask=inside & is_last & (slot + 1 < slots))


@triton.jit
def _add_partial_sums_kernel(
    table_ptr, part_ptr, y_ptr, ENTRIES, LENGTH, WIDTH,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[block, n] += Σ over the slots of that Fisher block's entries, which follow one another, in a fixed order."""
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_E)
    blocks = tl.load(table_ptr + ENTRIES * FISHER_BLOCK + index, mask=index < ENTRIES, other=-1)
    starts = tl.load(table_ptr + ENTRIES * FIRST_SLOT + index, mask=index < ENTRIES, other=0)
    counts = tl.load(table_ptr + ENTRIES * SLOTS + index, mask=index < ENTRIES, other=0)
    begin = tl.min(tl.where(blocks == block, starts, 1 << 40), 0)
    end = tl.max(tl.where(blocks == block, starts + counts, 0), 0)
    at = block.to(tl.int64) * LENGTH + n
    before = tl.load(y_ptr + at, mask=n < LENGTH, other=0.0)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in tl.range(begin, end, BLOCK_S, num_stages=4):  # three blocks of slots are on their way at a time
        slot = first + tl.arange(0, BLOCK_S)
        inside = (slot < end)[:, None] & (n < WIDTH)[None, :]
        total += tl.load(part_ptr + slot[:, None] * WIDTH + n[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + at, before + tl.sum(total, 0), mask=n < LENGTH)


ADD_PARTIAL_SUMS = single_config(
    _add_partial_sums_kernel,
    "*i64 *fp32 *fp32 i32 i32 i32",
    tiling(BLOCK_E=MAX_ENTRIES, BLOCK_S=64, BLOCK_N=32),
    unaligned=("ENTRIES", "LENGTH"),
    async_copies=True,
)


@dataclass(frozen=True)
class PartialSums(Launch):
    """A launch that computes partial sums, followed by one that adds them to the sums of Fisher blocks.

    Attributes:
        slots: the number of slots of all entries; a slot holds one partial sum for each sample.
        adder: the second kernel.
    """

    slots: int
    adder: Repeated

    def add_to(self, y_LN: Tensor) -> None:
        """Add the sums to y_LN in place; an entry with fewer than N samples adds zeros to the last ones."""
        blocks, length = y_LN.shape
        width, table = _width(length), self.table.fields_FE
        part_SN = torch.empty(self.slots, width, dtype=torch.float32, device=y_LN.device)
        self.kernel.start(self.grid, table, *self.dtype_examples, part_SN, self.entries, width)
        grid = (blocks, cdiv(length, ADD_PARTIAL_SUMS.block("N")))
        self.adder.start(grid, table, part_SN, y_LN, self.entries, length, width)


def _width(samples: int) -> int:
    """Return the entries of a slot: partial sums are loaded 16 bytes at a time for any number of samples."""
    return 16 * cdiv(samples, 16)


def partial_sums(
    config: Config,
    parts: Sequence[int],
    columns: Columns,
    pointers: Mapping[Any, int],
    entries: Entries,
    typed: int,
    samples: int,
) -> PartialSums:
    """Prepare the launches of `PartialSums`; the grid of the first is (parts, tiles of samples and positions).

    A part has one slot for each tile in which a sample may have positions (see `store_partial_sums`).

    Args:
        config: the kernel's launch configuration.
        parts: into how many parts each entry divides its weight.
        columns: the kernel's own fields without addresses, and FISHER_BLOCK (ascending), SAMPLES and POSITIONS.
        pointers: as for `Table`.
        entries: the tensors.
        typed: as for `entry_launch`.
        samples: N of the sums.
    """
    positions, tile = columns[POSITIONS], config.block("R")
    slots = [count * (1 + cdiv(p - 1, tile)) for count, p in zip(parts, positions, strict=True)]
    own = {FIRST_TILE: starts(parts), SLOTS: slots, FIRST_SLOT: starts(slots)}
    table = Table({**own, **columns}, pointers, entries)
    grid = (sum(parts), cdiv(_width(samples) * max(positions), tile))
    kernels, examples = (Repeated(config), Repeated(ADD_PARTIAL_SUMS)), dtype_examples_of(table, entries, typed)
    return PartialSums(kernels[0], grid, table, examples, len(parts), entries.copies, sum(slots), kernels[1])
