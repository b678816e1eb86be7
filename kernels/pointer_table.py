# ruff: noqa: ANN001, ANN201, ANN202  (the arguments of device code get their types at launch)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One launch for any number of tensors, which the kernel finds through a table of their addresses and sizes.

A small kernel writes the table. It takes addresses and sizes as launch arguments, so that nothing is copied from the
host and a CUDA graph replays it where the tensors stay in place. Tracing cannot see through an address: such an op is
opaque to it (`torch.library.custom_op`), and says itself what it changes.

Dimensions: T members of a group, F fields of the table, L rows of the result, N samples, P positions, S partial sums.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .spec import Config, cdiv, tl, triton

Key = TypeVar("Key", bound=Hashable)
MAX_GROUP = 128  # members of one launch
PAGE = 256  # entries of a table that one launch writes, so that one kernel of a second's compilation serves all tables


@triton.jit(do_not_specialize_on_alignment=["table_ptr"])
def _table_kernel(values, table_ptr):
    """Write a page of entries, which come as `_sent` has made them."""
    for k in tl.static_range(len(values)):
        tl.store(table_ptr + k, (values[k] >> 1) - (1 << 61))


TABLE = Config(
    kernel=_table_kernel,
    types=f"{','.join(PAGE * ['i64'])} *i64",
    constants={},
    unaligned=("values", "table_ptr"),
    num_warps=1,
)


def _sent(value: int) -> int:
    """Return a number as the kernel takes it: large and odd.

    Triton compiles anew for every pattern of ones, multiples of 16 and numbers of 32 bits in a tuple, whatever it is
    told not to specialize.
    """
    return (value + (1 << 61) << 1) + 1


class GroupEntry(NamedTuple):
    """What a kernel has to know of one member: its tensors, its sizes, and how many programs it takes."""

    tensors: Sequence[Tensor]
    numbers: Sequence[int]
    tiles: int


class Part(NamedTuple):
    """A member's partial sums: the row of the result that they belong to, and how many there are."""

    row: int
    slots: int
    samples: int
    positions: int


def table_of(members: Sequence[GroupEntry]) -> Tensor:
    """Return the members' addresses, where each one's programs begin among all, and their numbers, as fields_FT."""
    starts = accumulate((member.tiles for member in members), initial=0)
    addresses = zip(*([x.data_ptr() for x in member.tensors] for member in members), strict=True)
    numbers = zip(*((start, *member.numbers) for start, member in zip(starts, members, strict=False)), strict=True)
    flat = [x for field in (*addresses, *numbers) for x in field]
    return to_device(flat, members[0].tensors[0].device).view(-1, len(members))


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as a tensor of int64, for which nobody waits, unlike for a copy from the host."""
    pages = cdiv(len(numbers), PAGE)
    sent = [*map(_sent, numbers), *[_sent(0)] * (pages * PAGE - len(numbers))]
    table = torch.empty(len(sent), dtype=torch.int64, device=device)
    for page in range(0, len(sent), PAGE):
        TABLE.start((1,), tuple(sent[page : page + PAGE]), table[page:])
    return table[: len(numbers)]


def launch_group(config: Config, members: Sequence[GroupEntry], dtype_examples: Sequence[Tensor]) -> None:
    """Launch one kernel for all members; ``dtype_examples`` have the dtypes of what the addresses point to."""
    config.start((sum(member.tiles for member in members),), table_of(members), *dtype_examples, len(members))


def add_sums(
    config: Config, members: Sequence[GroupEntry], parts: Sequence[Part], dtype_examples: Sequence[Tensor], y_LN: Tensor
) -> None:
    """Launch a kernel that leaves partial sums for every member, and add these to their rows of the result.

    The members are in the order of their rows. Their tables get the parts' fields before their own.
    """
    sizes = [part.slots * part.samples * part.positions for part in parts]
    begins = accumulate(sizes, initial=0)
    described = [
        member._replace(numbers=(*part, begin, *member.numbers))
        for member, part, begin in zip(members, parts, begins, strict=False)
    ]
    table = table_of(described)
    part_S = torch.empty(sum(sizes), dtype=torch.float32, device=table.device)
    blocks = cdiv(max(part.samples * part.positions for part in parts), config.block("R"))
    config.start((sum(member.tiles for member in members), blocks), table, *dtype_examples, part_S, len(members))
    summing = SUM_PARTS[len(members[0].tensors)]
    rows, length = y_LN.shape
    summing.start((rows, cdiv(length, summing.block("N"))), table, part_S, y_LN, len(members), length)


def batches(
    keys: Sequence[Key], order: Sequence[int] | None = None, most: int = MAX_GROUP
) -> Iterator[tuple[Key, list[int]]]:
    """Yield which members go into one launch, in this order: equal keys, and at most as many as a launch can have."""
    places = range(len(keys)) if order is None else sorted(range(len(keys)), key=order.__getitem__)
    for key in dict.fromkeys(keys):
        alike = [index for index in places if keys[index] == key]
        for first in range(0, len(alike), most):
            yield key, alike[first : first + most]


def aligned(x: Tensor, entries: int) -> bool:
    """Whether rows are contiguous, and each begins and ends at a multiple of so many entries."""
    return x.stride(-1) == 1 and all(at % entries == 0 for at in (*x.stride()[:-1], x.shape[-1], x.storage_offset()))


@triton.jit
def number(table_ptr, field, member, MEMBERS):
    """A size or a distance of a member, as int32."""
    return tl.load(table_ptr + field * MEMBERS + member).to(tl.int32)


@triton.jit
def address(table_ptr, field, member, MEMBERS, like_ptr, UNIT: tl.constexpr):
    """A pointer of a member, of the type of ``like_ptr``, which is promised to be a multiple of UNIT entries."""
    BYTES: tl.constexpr = UNIT * (like_ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.multiple_of(tl.load(table_ptr + field * MEMBERS + member).to(like_ptr.dtype), BYTES)


@triton.jit
def entry(table_ptr, field, member, MEMBERS, o, pixel, i):
    """Where an entry of a parameter-shaped tensor lies, whose three strides are at a field."""
    stride_o = tl.load(table_ptr + field * MEMBERS + member)
    stride_k = tl.load(table_ptr + (field + 1) * MEMBERS + member)
    stride_i = tl.load(table_ptr + (field + 2) * MEMBERS + member)
    return o * stride_o + pixel * stride_k + i * stride_i


@triton.jit
def member_at(start_ptr, tile, MEMBERS, BLOCK_T: tl.constexpr):
    """The member that a tile belongs to, given where each one's begin."""
    index = tl.arange(0, BLOCK_T)
    starts = tl.load(start_ptr + index, mask=index < MEMBERS, other=1 << 40)
    return tl.sum((starts <= tile).to(tl.int32), 0) - 1


@triton.jit
def _sum_parts_kernel(
    table_ptr, part_ptr, y_ptr, MEMBERS, LENGTH, FIRST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y[row, n] += Σ over the members of that row, their slots and positions, in this order.

    From field FIRST on the table holds each member's row, slots, N, P, and where its partial sums begin.
    """
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_T)
    rows = tl.load(table_ptr + FIRST * MEMBERS + index, mask=index < MEMBERS, other=-1)
    first = tl.min(tl.where(rows == row, index, BLOCK_T), 0)
    end = tl.max(tl.where(rows == row, index + 1, 0), 0)
    at = row.to(tl.int64) * LENGTH + n
    total = tl.load(y_ptr + at, mask=n < LENGTH, other=0.0)
    for member in range(first, end):
        slots, samples = number(table_ptr, FIRST + 1, member, MEMBERS), number(table_ptr, FIRST + 2, member, MEMBERS)
        positions = number(table_ptr, FIRST + 3, member, MEMBERS)
        mine_ptr = part_ptr + tl.load(table_ptr + (FIRST + 4) * MEMBERS + member) + n.to(tl.int64) * positions
        for _slot in range(0, slots):
            for p in range(0, positions):
                total += tl.load(mine_ptr + p, mask=n < samples, other=0.0)
            mine_ptr += samples.to(tl.int64) * positions
    tl.store(y_ptr + at, total, mask=n < LENGTH)


SUM_PARTS = {
    addresses: Config(
        kernel=_sum_parts_kernel,
        types="*i64 *fp32 *fp32 i32 i32",
        constants={"FIRST": addresses + 1, "BLOCK_T": MAX_GROUP, "BLOCK_N": 32},
        unaligned=("MEMBERS", "LENGTH"),
    )
    for addresses in (2, 3)
}
