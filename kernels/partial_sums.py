# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums over the parts of weights and over the weights of Fisher blocks, for the ops that project.

A kernel divides the weight of each entry into parts and stores a partial sum for each. Then one kernel adds the sums of
all launches in a fixed order, so that the result is the same in every run.

Dimensions: L Fisher blocks, N samples, P positions, S slots, each of which holds a partial sum for N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launches import Launch, dtype_examples_of
from .pointer_table import FIRST_TILE, Columns, Entries, Table, fields, number, starts, to_device
from .spec import Config, Repeated, cdiv, single_config, tiling, tl, triton

# The numbers of samples and of positions, and the first of the slots of an entry.
SAMPLES, POSITIONS, FIRST_SLOT = fields(3, after=1)
AFTER_PARTIAL_SUMS = 4  # one more than the index of the last of these


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
    first_ptr, part_ptr, y_ptr, LENGTH, WIDTH, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y[block, n] = Σ over the slots of that Fisher block in their order: from its first to the next block's."""
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(first_ptr + block), tl.load(first_ptr + block + 1)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in tl.range(begin, end, BLOCK_S, num_stages=4):  # three blocks of slots are on their way at a time
        slot = first + tl.arange(0, BLOCK_S)
        inside = (slot < end)[:, None] & (n < WIDTH)[None, :]
        total += tl.load(part_ptr + slot[:, None] * WIDTH + n[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + block.to(tl.int64) * LENGTH + n, tl.sum(total, 0), mask=n < LENGTH)


ADD_PARTIAL_SUMS = single_config(
    _add_partial_sums_kernel,
    "*i64 *fp32 *fp32 i32 i32",
    tiling(BLOCK_S=64, BLOCK_N=32),
    unaligned=("LENGTH",),
    async_copies=True,
)


class Parts(NamedTuple):
    """A launch that stores partial sums, before its entries have slots.

    Its grid is (parts, tiles of samples and positions). A part has one slot for each tile in which a sample may have
    positions (see `store_partial_sums`).

    Attributes:
        config: the kernel's launch configuration.
        parts: into how many parts each entry divides its weight.
        blocks: the index of each entry's Fisher block.
        columns: the kernel's own fields without addresses, SAMPLES and POSITIONS among them.
        pointers: as for `Table`.
        entries: the tensors.
        typed: the number of the entries' lists, the first ones, whose dtypes the kernel takes examples of.
    """

    config: Config
    parts: Sequence[int]
    blocks: Sequence[int]
    columns: Columns
    pointers: Mapping[Any, int]
    entries: Entries
    typed: int

    def slots(self) -> list[int]:
        """Return the number of slots of each entry."""
        tile = self.config.block("R")
        pairs = zip(self.parts, self.columns[POSITIONS], strict=True)
        return [count * (1 + cdiv(positions - 1, tile)) for count, positions in pairs]

    def launch(self, first_slots: Sequence[int], width: int) -> Launch:
        """Prepare the launch for entries with these first slots; a slot holds ``width`` sums."""
        own = {FIRST_TILE: starts(self.parts), FIRST_SLOT: first_slots}
        table = Table({**own, **self.columns}, self.pointers, self.entries)
        grid = (sum(self.parts), cdiv(width * max(self.columns[POSITIONS]), self.config.block("R")))
        examples = dtype_examples_of(table, self.entries, self.typed)
        return Launch(Repeated(self.config), grid, table, examples, len(self.parts), self.entries.copies)


class PartialSums:
    """Launches that compute partial sums, and one that adds them to the sums y_LN of Fisher blocks.

    Attributes:
        launches: the first ones, in the order of the `Parts`.
    """

    def __init__(self, launches: Sequence[Parts], shape: Sequence[int]) -> None:
        """Prepare the launches; ``shape`` is that of y_LN, in which entries with fewer than N samples add zeros."""
        (blocks, _), self._shape = shape, tuple(shape)
        self._width = 16 * cdiv(shape[1], 16)  # partial sums are loaded 16 bytes at a time for any number of samples
        slots = [one.slots() for one in launches]
        of_block: list[list[tuple[int, int]]] = [[] for _ in range(blocks)]
        for at, one in enumerate(launches):
            for entry, block in enumerate(one.blocks):
                of_block[block].append((at, entry))
        order = [place for places in of_block for place in places]
        first_slots = dict(zip(order, starts(slots[at][entry] for at, entry in order), strict=True))
        self.launches = [
            one.launch([first_slots[at, entry] for entry in range(len(one.parts))], self._width)
            for at, one in enumerate(launches)
        ]
        ends = [sum(slots[at][entry] for at, entry in places) for places in of_block]
        first_L = [*starts(ends), sum(ends)]
        self._first_L, self._slots = to_device(first_L, launches[0].entries.lists[0][0].device), sum(ends)
        self._adder = Repeated(ADD_PARTIAL_SUMS)

    def start(self) -> Tensor:
        """Launch all kernels; return y_LN."""
        device, width = self._first_L.device, self._width
        part_SN = torch.empty(self._slots, width, dtype=torch.float32, device=device)
        y_LN = torch.empty(self._shape, dtype=torch.float32, device=device)
        for one in self.launches:
            one.kernel.start(one.grid, one.table.fields_FE, *one.dtype_examples, part_SN, one.entries, width)
        blocks, length = self._shape
        grid = (blocks, cdiv(length, ADD_PARTIAL_SUMS.block("N")))
        self._adder.start(grid, self._first_L, part_SN, y_LN, length, width)
        return y_LN
