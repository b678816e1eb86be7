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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .spec import TRITON_TYPES, Config, Repeated, single_config, tiling, tl, triton

Key = TypeVar("Key", bound=Hashable)
Columns = Mapping[Any, Sequence[int]]
"""The numbers of a table: for each field, its number for each entry."""

MAX_ENTRIES = 128  # the most entries of one launch
_FEW, _MANY = 32, 256  # how many numbers a launch takes: few sizes, because each is compiled (about a second)


def fields(singles: int, strides: int = 0, after: int = 0) -> Iterator[Any]:
    """Yield the indices of a table's fields: first those with a single number, then those with three strides.

    Args:
        singles: how many fields hold one number.
        strides: how many fields hold three strides.
        after: the index of the first of these fields: how many numbers of an entry come before them.
    """
    first = after + singles
    return map(tl.constexpr, (*range(after, first), *range(first, first + 3 * strides, 3)))


# FIRST_TILE is where an entry's programs begin in the grid. Every table begins with it.
(FIRST_TILE,) = fields(1)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table_ptr"])
def _write_kernel(values, table_ptr, count, SIZE: tl.constexpr):
    """Decode the first ``count`` of SIZE numbers, and write them to the table."""
    for k in tl.static_range(SIZE):
        tl.store(table_ptr + k, (values[k] >> 1) - (1 << 61), mask=k < count)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table_ptr"])
def _change_kernel(values, table_ptr, count, SIZE: tl.constexpr):
    """Decode the first ``count`` of SIZE numbers, pairs of an address and of the number to write there."""
    for k in tl.static_range(0, SIZE, 2):
        at = ((values[k] >> 1) - (1 << 61)).to(table_ptr.dtype)
        tl.store(at, (values[k + 1] >> 1) - (1 << 61), mask=k < count)


def _writers(kernel: Any) -> dict[int, Config]:
    return {
        size: single_config(
            kernel,
            f"{','.join(size * ['i64'])} *i64 i32",
            tiling(num_warps=1, SIZE=size),
            unaligned=("values", "table_ptr", "count"),
        )
        for size in (_FEW, _MANY)
    }


_WRITE, _CHANGE = _writers(_write_kernel), _writers(_change_kernel)
TABLE, TABLE_CHANGES = tuple(_WRITE.values()), tuple(_CHANGE.values())
_started: dict[Hashable, Repeated] = {}

# Numbers reach the kernel as large odd ones. Triton compiles a kernel again for arguments that are 1, a multiple of 16,
# or small enough for 32 bits; these are none of them, so one compiled kernel writes all numbers.
_CODE_OF_ZERO = (1 << 62) + 1
_PADDING = (_CODE_OF_ZERO,) * _MANY


def _code(number: int) -> int:
    return 2 * number + _CODE_OF_ZERO


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as an int64 tensor without a copy from the host, which would wait for the device."""
    written = torch.empty(len(numbers), dtype=torch.int64, device=device)
    _start(_WRITE, [*map(_code, numbers)], written, in_order=True)
    return written


def _change(codes: Sequence[int], table_FE: Tensor) -> None:
    """Write numbers to addresses on the device of a table; the code of each number follows that of its address."""
    _start(_CHANGE, codes, table_FE, in_order=False)


def _start(kernels: Mapping[int, Config], codes: Sequence[int], tensor: Tensor, in_order: bool) -> None:
    """Launch as often as it takes; ``in_order`` says whether each number has its place in the tensor."""
    size = _FEW if len(codes) <= _FEW else _MANY
    key = (tensor.device, id(kernels[size]))
    if key not in _started:
        _started[key] = Repeated(kernels[size])
    for first in range(0, len(codes), size):
        part = codes[first : first + size]
        padded = (*part, *_PADDING[: size - len(part)])
        _started[key].start((1,), padded, tensor[first:] if in_order else tensor, len(part))


def table_of(columns: Columns, device: torch.device) -> Tensor:
    """Return the table fields_FE; ``columns`` has all fields that the kernel declares, in any order."""
    ordered = sorted((field.value, column) for field, column in columns.items())
    assert [index for index, _ in ordered] == list(range(len(ordered))), "a field is missing"
    return to_device([number for _, column in ordered for number in column], device).view(len(ordered), -1)


class Entries(NamedTuple):
    """The tensors of the entries of one launch.

    Attributes:
        lists: an op's lists of tensors, in the order of its arguments.
        indices: the indices of the entries in each list.
        copies: the tensors of ``lists`` that are no arguments of the op, but copies of them.
    """

    lists: Sequence[Sequence[Tensor]]
    indices: list[int]
    copies: Sequence[Tensor]

    def of(self, argument: int) -> list[Tensor]:
        """Return the entries' tensors of one list."""
        return [self.lists[argument][index] for index in self.indices]


class Slot(NamedTuple):
    """Where a table holds the address of a tensor.

    Attributes:
        argument: the index of the tensor's list among the lists of the op.
        place: the index of the tensor in that list.
        address: where the table has the tensor's address.
    """

    argument: int
    place: int
    address: int


class Table:
    """A table of one launch.

    Attributes:
        fields_FE: the table.
        slots: where it holds addresses.
    """

    def __init__(self, columns: Columns, pointers: Mapping[Any, int], entries: Entries) -> None:
        """Write a table.

        Args:
            columns: all fields but those of addresses.
            pointers: for each field of addresses, which of the entries' lists its tensors are in.
            entries: the tensors.

        Raises:
            TypeError: the tensors are on several devices, or in dtypes that kernels do not take.
        """
        _expect_one_device(entries)
        own = {field: addresses(entries.of(argument)) for field, argument in pointers.items()}
        self.fields_FE = table_of({**columns, **own}, entries.lists[0][0].device)
        first, bytes_of_field = self.fields_FE.data_ptr(), 8 * self.fields_FE.shape[1]
        self.slots = [
            Slot(argument, place, first + field.value * bytes_of_field + 8 * entry)
            for field, argument in pointers.items()
            for entry, place in enumerate(entries.indices)
        ]


class Addresses:
    """Addresses of tensors, in every slot that has them; they are written again where they change."""

    def __init__(self, slots: Sequence[Sequence[int]], addresses: Sequence[int], table: Table) -> None:
        """Note what the tables hold.

        Args:
            slots: for each tensor, the addresses of its slots.
            addresses: of the tensors.
            table: one of the tables.
        """
        self._slot_codes, self._table_FE = [[*map(_code, own)] for own in slots], table.fields_FE
        self._known: Sequence[int | None] = addresses

    def become(self, addresses: Sequence[int]) -> None:
        """Write those of the addresses that are others than before."""
        if addresses == self._known:
            return
        changes: list[int] = []
        for slots, old, new in zip(self._slot_codes, self._known, addresses, strict=True):
            if new != old:
                code = _code(new)
                for slot in slots:
                    changes += (slot, code)
        self._known = [None] * len(addresses)  # an interrupted write leaves it open what the tables hold
        _change(changes, self._table_FE)
        self._known = addresses


def _expect_one_device(entries: Entries) -> None:
    tensors = [x for argument in range(len(entries.lists)) for x in entries.of(argument)]
    kinds = {(str(x.device), str(x.dtype)) for x in tensors}
    if len({x.device for x in tensors}) > 1 or not {x.dtype for x in tensors} <= TRITON_TYPES.keys():
        raise TypeError(f"a kernel takes tensors of one device, in float32 or half precision; got {sorted(kinds)}")


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return the tensors' addresses, the numbers of a field."""
    return [x.data_ptr() for x in tensors]


def strides(field: Any, tensors: Sequence[Tensor], unit: int = 1) -> dict[Any, list[int]]:
    """Return the columns of the tensors' first three strides, in units of ``unit`` elements."""
    return {field + axis: [x.stride(axis) // unit for x in tensors] for axis in range(3)}


def starts(counts: Iterable[int]) -> list[int]:
    """Return where each range begins if ranges of these lengths follow one another."""
    return [*accumulate(counts, initial=0)][:-1]


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
    sizes = (*x.stride()[:-1], x.shape[-1], x.data_ptr() // x.itemsize)
    return x.stride(-1) == 1 and all(size % unit == 0 for size in sizes)


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
