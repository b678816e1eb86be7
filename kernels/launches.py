"""Launches for lists of tensors, prepared once and repeated: each step launches the same kernels for such tensors.

To prepare a launch takes the host longer than the kernel takes the device: shapes are checked, tensors are grouped, and
a table is written (see `pointer_table`). All of this but the addresses stays as it is while the layouts of the tensors
do. So `prepared` returns the launches of an earlier call with the same layouts, and writes the addresses that changed.

Dimensions: F fields, E entries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .pointer_table import FIRST_TILE, Addresses, Columns, Entries, Table, starts
from .spec import Config, Repeated, triton


@dataclass(frozen=True)
class Launch:
    """A launch of one kernel for some entries of a table.

    Attributes:
        kernel: the kernel in a launch configuration.
        grid: of the launch.
        table: the table of the entries.
        dtype_examples: tensors of the dtypes that the table's addresses point to.
        entries: the number of entries.
        copies: the tensors that the kernel reads in place of the op's arguments, which had to be converted.
    """

    kernel: Repeated
    grid: tuple[int, ...]
    table: Table
    dtype_examples: Sequence[Tensor]
    entries: int
    copies: Sequence[Tensor]

    def start(self) -> None:
        """Launch the kernel."""
        self.kernel.start(self.grid, self.table.fields_FE, *self.dtype_examples, self.entries)


def entry_launch(
    config: Config, tiles: Sequence[int], columns: Columns, pointers: Mapping[Any, int], entries: Entries, typed: int
) -> Launch:
    """Prepare a launch whose grid is one-dimensional.

    Args:
        config: the kernel's launch configuration.
        tiles: how many programs each entry takes.
        columns: the kernel's fields, without FIRST_TILE and addresses.
        pointers: as for `Table`.
        entries: the tensors.
        typed: the number of the entries' lists, the first ones, whose dtypes the kernel takes examples of.
    """
    table = Table({FIRST_TILE: starts(tiles), **columns}, pointers, entries)
    examples = dtype_examples_of(table, entries, typed)
    return Launch(Repeated(config), (sum(tiles),), table, examples, len(tiles), entries.copies)


def dtype_examples_of(table: Table, entries: Entries, typed: int) -> tuple[Tensor, ...]:
    """Return the table as a tensor of each dtype: launches that are kept must not keep the op's tensors."""
    first = entries.indices[0]
    return tuple(table.fields_FE.view(tensors[first].dtype) for tensors in entries.lists[:typed])


def converted(convert: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], copies: list[Tensor]) -> list[Tensor]:
    """Return ``convert`` of each tensor; append those results that are not in the same memory to ``copies``."""
    results = [convert(x) for x in tensors]
    copies += [new for new, x in zip(results, tensors, strict=True) if new is not x and new.data_ptr() != x.data_ptr()]
    return results


class Prepared(Protocol):
    """What an op launches."""

    @property
    def launches(self) -> Sequence[Launch]:
        """Return the launches whose tables point to the op's tensors."""

    def start(self) -> Any:
        """Launch all kernels, and return the op's result."""


@dataclass(frozen=True)
class Updates:
    """The launches of an op that changes its arguments in place."""

    launches: Sequence[Launch]

    def start(self) -> None:
        """Launch all kernels."""
        for one in self.launches:
            one.start()


def slots_of(launches: Iterable[Launch], argument: int, count: int) -> list[list[int]]:
    """Return, for each of ``count`` tensors in one list of an op, where the tables of its launches have its address."""
    found: list[list[int]] = [[] for _ in range(count)]
    for slot in (slot for one in launches for slot in one.table.slots if slot.argument == argument):
        found[slot.place].append(slot.address)
    return found


P = TypeVar("P", bound=Prepared)

_MOST = 64  # how many ops' launches are kept; a table takes some kilobytes
_kept: OrderedDict[Hashable, tuple[Any, Addresses]] = OrderedDict()
_keeps: ContextVar[bool] = ContextVar("keeps", default=True)


def may_keep(device: torch.device) -> bool:
    """Return whether launches for tensors of a device may be repeated by a later call.

    They may not while a CUDA graph is captured, because a replay must write the table that it reads; and not within
    `without_memory`.
    """
    return _keeps.get() and not _is_capturing(device)


def has_copies(launches: Iterable[Launch]) -> bool:
    """Return whether some kernel reads a copy in place of an argument: it is freed after the op."""
    return any(one.copies for one in launches)


def prepared(prepare: Callable[..., P], *arguments: Any) -> P:
    """Return ``prepare(*arguments)``, or the launches of an earlier call with tensors of the same layouts.

    Args:
        prepare: returns the launches of an op, from its arguments.
        arguments: lists of tensors first, as `Entries` has them, then others.
    """
    lists = [x for x in arguments if isinstance(x, list) and isinstance(x[0], Tensor)]
    device = lists[0][0].device
    if not may_keep(device):
        return prepare(*arguments)
    others = tuple(tuple(x) if isinstance(x, list) else x for x in arguments[len(lists) :])
    layouts = tuple(tuple(layout_of(x) for x in tensors) for tensors in lists)
    key = (prepare, launch_place(device), others, layouts)
    present = [x.data_ptr() for tensors in lists for x in tensors]
    if key in _kept:
        found, addresses = _kept[key]
        _kept.move_to_end(key)
        addresses.become(present)
        return cast("P", found)
    made = prepare(*arguments)
    if not has_copies(made.launches):
        slots = [own for at, x in enumerate(lists) for own in slots_of(made.launches, at, len(x))]
        _kept[key] = made, Addresses(slots, present, made.launches[0].table)
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    return made


def launch_place(device: torch.device) -> Hashable:
    """Return where launches are repeated: the present thread, and its present stream on a device.

    Only a stream orders the kernel that writes a table and those that read it. Another thread could write the table
    between the two.
    """
    return threading.get_ident(), device, _stream(device)


def layout_of(x: Tensor) -> Hashable:
    """Return all that launches depend on of a tensor, except its address."""
    return x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 32


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """Return the stream on which Triton launches; 0 without a GPU, where Triton's interpreter runs the kernels."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


@contextmanager
def without_memory() -> Iterator[None]:
    """Prepare every launch anew within the context, and keep none.

    The first calls of a compiled function that replays CUDA graphs need this: they warm up in the memory of the graphs,
    which later replays overwrite.
    """
    token = _keeps.set(False)
    try:
        yield
    finally:
        _keeps.reset(token)
