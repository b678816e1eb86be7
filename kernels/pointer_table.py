# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One launch for a group of tensors, which the kernel finds through a table of their addresses and sizes.

The table has one column of numbers a field and one entry a tensor (or a tuple of tensors that belong together). A
kernel's file declares its fields once, by name (`fields`): the launcher fills the columns by these names, and device
code reads them by the same names. A change of the order invalidates Triton's cache, because the names are constants.

A small kernel writes the table. The numbers are launch arguments of it: nothing is copied from the host, and a CUDA
graph replays the write while the tensors stay in place. Tracing cannot see through an address, so an op with such a
table is opaque to it (`torch.library.custom_op`) and declares what it changes.

Dimensions: F fields, T entries, L Fisher blocks, N samples, P positions, S partial sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from .spec import Config, cdiv, tl, triton

Key = TypeVar("Key", bound=Hashable)
Columns = Mapping[Any, Sequence[int]]
"""The numbers of a table: for each field one number an entry."""

MAX_GROUP = 128  # entries of one launch
_WRITE_SIZE = 256  # numbers that one launch writes: one compiled kernel (about a second) writes every table


def fields(singles: int, strides: int = 0, after: int = 0) -> Iterator[Any]:
    """Yield the indices of a table's fields: single numbers first, then sets of three strides, which take three each.

    Args:
        singles: how many fields hold one number.
        strides: how many fields hold three strides.
        after: how many fields the kernel's table has before these.
    """
    first = after + singles
    return map(tl.constexpr, (*range(after, first), *range(first, first + 3 * strides, 3)))


# The fields of every tiled table come first: where an entry's programs begin in the grid, and what `add_partial_sums`
# needs: the Fisher block, slots (partial sums of one sample and position), samples, positions, and where they begin.
FIRST_TILE, BLOCK, SLOTS, SAMPLES, POSITIONS, FIRST_PART = fields(6)


@triton.jit(do_not_specialize_on_alignment=["table_ptr"])
def _write_kernel(values, table_ptr):
    """Write some numbers, which `_encoded` has made large and odd."""
    for k in tl.static_range(len(values)):
        tl.store(table_ptr + k, (values[k] >> 1) - (1 << 61))


TABLE = Config(
    kernel=_write_kernel,
    types=f"{','.join(_WRITE_SIZE * ['i64'])} *i64",
    constants={},
    unaligned=("values", "table_ptr"),
    num_warps=1,
)


def _encoded(value: int) -> int:
    """Return a number as a large and odd one.

    Triton would compile a kernel for every pattern of ones, multiples of 16 and 32-bit numbers in a tuple.
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
    """Return the table fields_FT; the columns are all fields of the kernel's declaration, in any order."""
    ordered = sorted((field.value, column) for field, column in columns.items())
    assert [index for index, _ in ordered] == list(range(len(ordered))), "a field is missing"
    return to_device([number for _, column in ordered for number in column], device).view(len(ordered), -1)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return the column of the tensors' addresses."""
    return [x.data_ptr() for x in tensors]


def strides(field: Any, tensors: Sequence[Tensor], unit: int = 1) -> dict[Any, list[int]]:
    """Return the columns of the tensors' first three strides, in units of so many entries."""
    return {field + at: [x.stride(at) // unit for x in tensors] for at in range(3)}


def starts(counts: Iterable[int]) -> list[int]:
    """Return where each of some consecutive ranges of these lengths begins."""
    return [*accumulate(counts, initial=0)][:-1]


def launch_group(config: Config, tiles: Sequence[int], columns: Columns, dtype_examples: Sequence[Tensor]) -> None:
    """Launch one kernel for a group of entries that take so many programs each.

    ``dtype_examples`` are tensors of the dtypes that the table's addresses point to.
    """
    table = table_of({FIRST_TILE: starts(tiles), **columns}, dtype_examples[0].device)
    config.start((sum(tiles),), table, *dtype_examples, len(tiles))


def add_partial_sums(
    config: Config, slots: Sequence[int], columns: Columns, dtype_examples: Sequence[Tensor], y_LN: Tensor
) -> None:
    """Launch a kernel that computes partial sums for a group of entries, and add them to their blocks' sums y_LN.

    Args:
        config: of a kernel with as many programs an entry as the entry has slots, by blocks of (sample, position).
        slots: partial sums of one sample and position, for each entry.
        columns: the kernel's own fields, and BLOCK (ascending), SAMPLES and POSITIONS.
        dtype_examples: tensors of the dtypes that the table's addresses point to.
        y_LN: the sums, changed in place; an entry with fewer samples adds to the first ones.
    """
    pairs = [n * p for n, p in zip(columns[SAMPLES], columns[POSITIONS], strict=True)]
    sizes = [count * size for count, size in zip(slots, pairs, strict=True)]
    own = {FIRST_TILE: starts(slots), SLOTS: slots, FIRST_PART: starts(sizes)}
    table = table_of({**own, **columns}, y_LN.device)
    part_S = torch.empty(sum(sizes), dtype=torch.float32, device=y_LN.device)
    config.start((sum(slots), cdiv(max(pairs), config.block("R"))), table, *dtype_examples, part_S, len(slots))
    blocks, length = y_LN.shape
    grid = (blocks, cdiv(length, ADD_PARTIAL_SUMS.block("N")))
    ADD_PARTIAL_SUMS.start(grid, table, part_S, y_LN, len(slots), length)


def batches(
    keys: Sequence[Key], order: Sequence[int] | None = None, most: int = MAX_GROUP
) -> Iterator[tuple[Key, list[int]]]:
    """Yield the indices of entries that share a launch, with their key: equal keys, and at most ``most`` entries.

    ``order`` sorts the entries of a launch; by default they keep their order.
    """
    places = range(len(keys)) if order is None else sorted(range(len(keys)), key=order.__getitem__)
    for key in dict.fromkeys(keys):
        equal = [index for index in places if keys[index] == key]
        for first in range(0, len(equal), most):
            yield key, equal[first : first + most]


def is_aligned(x: Tensor, entries: int) -> bool:
    """Return whether the last dimension is contiguous, and begins and ends at multiples of so many entries."""
    return x.stride(-1) == 1 and all(at % entries == 0 for at in (*x.stride()[:-1], x.shape[-1], x.storage_offset()))


@triton.jit
def number(table_ptr, field, entry, ENTRIES):
    """Return a size or a stride of an entry as int32."""
    return tl.load(table_ptr + ENTRIES * field + entry).to(tl.int32)


@triton.jit
def address(table_ptr, field, entry, ENTRIES, like_ptr, UNIT: tl.constexpr):
    """Return a pointer of an entry, of the type of ``like_ptr`` and aligned to UNIT numbers."""
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
def entry_at(table_ptr, tile, ENTRIES, BLOCK_T: tl.constexpr):
    """Return the entry that a program of the grid belongs to."""
    index = tl.arange(0, BLOCK_T)
    first = tl.load(table_ptr + ENTRIES * FIRST_TILE + index, mask=index < ENTRIES, other=1 << 40)
    return tl.sum((first <= tile).to(tl.int32), 0) - 1


@triton.jit
def _add_partial_sums_kernel(
    table_ptr, part_ptr, y_ptr, ENTRIES, LENGTH, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y[block, n] += Σ over the entries of that block, their slots and positions, in this order."""
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_T)
    blocks = tl.load(table_ptr + ENTRIES * BLOCK + index, mask=index < ENTRIES, other=-1)
    first = tl.min(tl.where(blocks == block, index, BLOCK_T), 0)
    end = tl.max(tl.where(blocks == block, index + 1, 0), 0)
    at = block.to(tl.int64) * LENGTH + n
    total = tl.load(y_ptr + at, mask=n < LENGTH, other=0.0)
    for entry in range(first, end):
        slots = number(table_ptr, SLOTS, entry, ENTRIES)
        samples = number(table_ptr, SAMPLES, entry, ENTRIES)
        positions = number(table_ptr, POSITIONS, entry, ENTRIES)
        entry_ptr = part_ptr + tl.load(table_ptr + ENTRIES * FIRST_PART + entry) + n.to(tl.int64) * positions
        for _slot in range(0, slots):
            for p in range(0, positions):
                total += tl.load(entry_ptr + p, mask=n < samples, other=0.0)
            entry_ptr += samples.to(tl.int64) * positions
    tl.store(y_ptr + at, total, mask=n < LENGTH)


ADD_PARTIAL_SUMS = Config(
    kernel=_add_partial_sums_kernel,
    types="*i64 *fp32 *fp32 i32 i32",
    constants={"BLOCK_T": MAX_GROUP, "BLOCK_N": 32},
    unaligned=("ENTRIES", "LENGTH"),
)
