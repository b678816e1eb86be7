# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One launch for a list of tensors, which the kernel finds through a table of their addresses and sizes.

An entry of the table stands for one tensor, or for several that belong together, such as a parameter and its momentum.
A field is one number that every entry has. For example, two matrices may have this table of three fields:

    field      entry 0         entry 1
    address    0x7f52c0000000  0x7f52c0040000
    height     64              150
    stride     128             48

A kernel's file declares its fields once, by name (`fields`). The launcher fills the table by these names, and device
code reads it by the same names. The names are constants of the compiled code.

A small kernel writes the table; the numbers are arguments of its launch. So nothing is copied from the host, and a CUDA
graph can replay the write as long as the tensors keep their addresses. Tracing cannot follow an address. So an op with
such a table is a `torch.library.custom_op`, which tracing does not enter; it declares the arguments that it changes.

Dimensions: F fields, E entries, L Fisher blocks, N samples, P positions, S slots.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from .spec import Config, cdiv, single_config, tiling, tl, triton

Key = TypeVar("Key", bound=Hashable)
Columns = Mapping[Any, Sequence[int]]
"""The numbers of a table: for each field, its number for each entry."""

MAX_ENTRIES = 128  # the most entries of one launch
_WRITE_SIZE = 256  # every launch writes this many numbers, so that the kernel is compiled only once (about a second)


def fields(singles: int, strides: int = 0, after: int = 0) -> Iterator[Any]:
    """Yield the indices of a table's fields: first those with a single number, then those with three strides.

    Args:
        singles: how many fields hold one number.
        strides: how many fields hold three strides.
        after: the index of the first of these fields: how many numbers of an entry come before them.
    """
    first = after + singles
    return map(tl.constexpr, (*range(after, first), *range(first, first + 3 * strides, 3)))


# FIRST_TILE is where an entry's programs begin in the grid; every table of `launch_entries` begins with it. The other
# fields are those of `add_partial_sums`: the index of the Fisher block; the numbers of samples and of positions; SLOTS,
# how many partial sums each sample of the entry has; and FIRST_SLOT, how many slots the entries before it have.
FIRST_TILE, FISHER_BLOCK, SAMPLES, POSITIONS, SLOTS, FIRST_SLOT = fields(6)
AFTER_PARTIAL_SUMS = 6  # one more than the index of the last of these


@triton.jit(do_not_specialize_on_alignment=["table_ptr"])
def _write_kernel(values, table_ptr):
    """Decode numbers from `_encoded` and write them to the table."""
    for k in tl.static_range(len(values)):
        tl.store(table_ptr + k, (values[k] >> 1) - (1 << 61))


TABLE = single_config(
    _write_kernel, f"{','.join(_WRITE_SIZE * ['i64'])} *i64", tiling(num_warps=1), unaligned=("values", "table_ptr")
)


def _encoded(value: int) -> int:
    """Return a number as a large odd one.

    Triton compiles a kernel again for arguments that are 1, a multiple of 16, or small enough for 32 bits. Encoded
    numbers are none of these, so one compiled kernel writes every table.
    """
    return (value + (1 << 61) << 1) + 1


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as an int64 tensor without a copy from the host, which would wait for the device."""
    launches = cdiv(len(numbers), _WRITE_SIZE)
    encoded = [*map(_encoded, numbers), *[_encoded(0)] * (launches * _WRITE_SIZE - len(numbers))]
    table = torch.empty(len(encoded), dtype=torch.int64, device=device)
    for first in range(0, len(encoded), _WRITE_SIZE):
        TABLE.start((1,), tuple(encoded[first : first + _WRITE_SIZE]), table[first:])
    return table[: len(numbers)]


def table_of(columns: Columns, device: torch.device) -> Tensor:
    """Return the table fields_FE; ``columns`` has all fields that the kernel declares, in any order."""
    ordered = sorted((field.value, column) for field, column in columns.items())
    assert [index for index, _ in ordered] == list(range(len(ordered))), "a field is missing"
    return to_device([number for _, column in ordered for number in column], device).view(len(ordered), -1)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return the tensors' addresses, the numbers of a field."""
    return [x.data_ptr() for x in tensors]


def strides(field: Any, tensors: Sequence[Tensor], unit: int = 1) -> dict[Any, list[int]]:
    """Return the columns of the tensors' first three strides, in units of ``unit`` elements."""
    return {field + axis: [x.stride(axis) // unit for x in tensors] for axis in range(3)}


def starts(counts: Iterable[int]) -> list[int]:
    """Return where each range begins if ranges of these lengths follow one another."""
    return [*accumulate(counts, initial=0)][:-1]


def launch_entries(config: Config, tiles: Sequence[int], columns: Columns, dtype_examples: Sequence[Tensor]) -> None:
    """Launch one kernel for some entries.

    Args:
        config: the kernel's launch configuration.
        tiles: how many programs each entry takes.
        columns: all fields of the kernel except FIRST_TILE.
        dtype_examples: tensors of the dtypes that the table's addresses point to.
    """
    table = table_of({FIRST_TILE: starts(tiles), **columns}, dtype_examples[0].device)
    config.start((sum(tiles),), table, *dtype_examples, len(tiles))


def add_partial_sums(
    config: Config, parts: Sequence[int], columns: Columns, dtype_examples: Sequence[Tensor], y_LN: Tensor
) -> None:
    """Launch a kernel that computes partial sums for some entries, and add them to the sums y_LN of Fisher blocks.

    A slot holds one partial sum for each sample, for example the sum over one tile of a weight.

    Args:
        config: the kernel's launch configuration. Its grid is (parts of all entries, tiles of samples and positions). A
            part has one slot for each tile in which a sample may have positions (see `store_partial_sums`).
        parts: into how many parts each entry divides its weight.
        columns: the kernel's own fields, and FISHER_BLOCK (ascending), SAMPLES and POSITIONS.
        dtype_examples: tensors of the dtypes that the table's addresses point to.
        y_LN: the sums, changed in place; an entry with fewer than N samples adds zeros to the last ones.
    """
    positions, tile = columns[POSITIONS], config.block("R")
    slots = [count * (1 + cdiv(p - 1, tile)) for count, p in zip(parts, positions, strict=True)]
    own = {FIRST_TILE: starts(parts), SLOTS: slots, FIRST_SLOT: starts(slots)}
    table = table_of({**own, **columns}, y_LN.device)
    blocks, length = y_LN.shape
    width = 16 * cdiv(length, 16)  # partial sums are then loaded 16 bytes at a time for any N
    part_SN = torch.empty(sum(slots), width, dtype=torch.float32, device=y_LN.device)
    config.start((sum(parts), cdiv(width * max(positions), tile)), table, *dtype_examples, part_SN, len(parts), width)
    grid = (blocks, cdiv(length, ADD_PARTIAL_SUMS.block("N")))
    ADD_PARTIAL_SUMS.start(grid, table, part_SN, y_LN, len(parts), length, width)


def launches_of(
    keys: Sequence[Key], order: Sequence[int] | None = None, most: int = MAX_ENTRIES
) -> Iterator[tuple[Key, list[int]]]:
    """Yield, for each launch, its key and the indices of its entries: they have equal keys, and are at most ``most``.

    ``order`` sorts the entries of a launch; by default they keep their order.
    """
    indices = range(len(keys)) if order is None else sorted(range(len(keys)), key=order.__getitem__)
    for key in dict.fromkeys(keys):
        equal = [index for index in indices if keys[index] == key]
        for first in range(0, len(equal), most):
            yield key, equal[first : first + most]


def is_aligned(x: Tensor, unit: int) -> bool:
    """Return whether the last dimension is contiguous, and begins and ends at multiples of ``unit`` elements."""
    return x.stride(-1) == 1 and all(size % unit == 0 for size in (*x.stride()[:-1], x.shape[-1], x.storage_offset()))


@triton.jit
def number(table_ptr, field, entry, ENTRIES):
    """Return a size or a stride of an entry as int32."""
    return tl.load(table_ptr + ENTRIES * field + entry).to(tl.int32)


@triton.jit
def address(table_ptr, field, entry, ENTRIES, like_ptr, UNIT: tl.constexpr):
    """Return a pointer of an entry, of the type of ``like_ptr`` and aligned to UNIT elements."""
    BYTES: tl.constexpr = UNIT * (like_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.multiple_of(tl.load(table_ptr + ENTRIES * field + entry).to(like_ptr.dtype), BYTES)


@triton.jit
def strided(table_ptr, field, entry, ENTRIES, x, y, z):
    """Return the offsets of the indices [x, y, z] in a tensor whose three strides a field holds."""
    stride_x = tl.load(table_ptr + ENTRIES * field + entry)
    stride_y = tl.load(table_ptr + ENTRIES * (field + 1) + entry)
    stride_z = tl.load(table_ptr + ENTRIES * (field + 2) + entry)
    return x * stride_x + y * stride_y + z * stride_z


@triton.jit
def entry_at(table_ptr, tile, ENTRIES, BLOCK_E: tl.constexpr):
    """Return the entry to which a program of the grid belongs."""
    index = tl.arange(0, BLOCK_E)
    first = tl.load(table_ptr + ENTRIES * FIRST_TILE + index, mask=index < ENTRIES, other=1 << 40)
    return tl.sum((first <= tile).to(tl.int32), 0) - 1


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
