"""Launches for lists of tensors, prepared once and repeated: each step launches the same kernels for such tensors.

To prepare a launch takes the host longer than the kernel takes the device: shapes are checked, tensors are grouped, and
a table is written (see `pointer_table`). All of this but the addresses stays as it is while the layouts of the tensors
do. So `prepared` returns the launches of an earlier call with the same layouts, and writes the addresses that changed.

Dimensions: F fields, E entries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

from .pointer_table import FIRST_TILE, Columns, Entries, Table, starts
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
    """Return ``convert`` of each tensor; append those results that are not the tensor itself to ``copies``."""
    results = [convert(x) for x in tensors]
    copies += [result for result, x in zip(results, tensors, strict=True) if result is not x]
    return results


class TensorList(list[Tensor]):
    """A list of tensors that remembers their layouts, for callers that give the same list to an op in every step."""

    _pointers: Sequence[int] | None = None
    _layout = 0

    @staticmethod
    def of(tensors: list[Tensor]) -> TensorList:
        """Return the list itself, or its tensors in a list that remembers."""
        return tensors if isinstance(tensors, TensorList) else TensorList(tensors)

    def layout(self, pointers: Sequence[int]) -> int:
        """Return a number for all that launches depend on of the tensors, except their addresses ``pointers``.

        A tensor that has the address of the last call has its layout as well: the list keeps it alive.
        """
        if pointers != self._pointers:
            pairs = zip(self, pointers, strict=True)
            layouts = tuple([(x.device, x.shape, x.stride(), x.dtype, at % 32) for x, at in pairs])
            self._layout, self._pointers = _number_of(layouts), pointers
        return self._layout


_layouts: dict[Hashable, int] = {}
_numbers = count()
_MOST_LAYOUTS = 1024


def _number_of(layouts: Hashable) -> int:
    if len(_layouts) >= _MOST_LAYOUTS:  # the same layouts get another number, so their launches are prepared once more
        _layouts.clear()
    return _layouts.setdefault(layouts, next(_numbers))


L = TypeVar("L", bound=Launch)

_MOST = 64  # how many ops' launches are kept; a table takes some kilobytes
_kept: OrderedDict[Hashable, Any] = OrderedDict()
_keeps: ContextVar[bool] = ContextVar("keeps", default=True)


def prepared(prepare: Callable[..., Sequence[L]], *arguments: Any) -> Sequence[L]:
    """Return ``prepare(*arguments)``, or the launches of an earlier call with tensors of the same layouts.

    Args:
        prepare: returns the launches of an op, from its arguments.
        arguments: lists of tensors first, as `Entries` has them, then others.

    Each stream has launches of its own, because only a stream orders the kernel that writes a table and those that read
    it. So has each thread, because another one could write the table between the two. Launches are not kept while a
    CUDA graph is captured, because a replay must write the table that it reads; nor where an argument was converted,
    because the kernel then reads a copy, which is freed after the op.
    """
    lists = [TensorList.of(x) for x in arguments if isinstance(x, list) and isinstance(x[0], Tensor)]
    device = lists[0][0].device
    if not _keeps.get() or _is_capturing(device):
        return prepare(*arguments)
    pointers = [[x.data_ptr() for x in tensors] for tensors in lists]
    others = tuple(tuple(x) if isinstance(x, list) else x for x in arguments[len(lists) :])
    layouts = [tensors.layout(own) for tensors, own in zip(lists, pointers, strict=True)]
    key = (prepare, threading.get_ident(), device, _stream(device), others, *layouts)
    launches: Sequence[L] | None = _kept.pop(key, None)  # gone if the writes below are interrupted
    if launches is None:
        launches = prepare(*arguments)
    else:
        for launch in launches:
            launch.table.point_to(pointers)
    if not any(launch.copies for launch in launches):
        _keep(key, launches)
    return launches


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """Return the stream on which Triton launches; 0 without a GPU, where Triton's interpreter runs the kernels."""
    return triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0


def _keep(key: Hashable, launches: Any) -> None:
    """Keep launches as the last ones used; the first ones go if there are too many."""
    _kept[key] = launches
    if len(_kept) > _MOST:
        _kept.popitem(last=False)


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
