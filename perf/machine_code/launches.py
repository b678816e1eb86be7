"""What an op launches for arguments that only have shapes: no entry is computed, and no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from tengrad_triton.kernels.pointer_table import TABLE, TABLE_CHANGES
from tengrad_triton.kernels.spec import Config, KernelSpec

_MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all calls, because ops may keep tables from call to call


class Launch(NamedTuple):
    """One launch of a kernel."""

    config: Config
    grid: tuple[int, ...]


class Work(NamedTuple):
    """What a call of an op launches and costs.

    Attributes:
        arguments: the op's arguments, tensors without entries among them.
        launches: the launches in their order, without those that write tables of addresses.
        flops: how many arithmetic operations the mathematics needs.
        bytes: how many bytes must be read or written at least once.
    """

    arguments: tuple[Any, ...]
    launches: tuple[Launch, ...]
    flops: int
    bytes: int


def work_of(spec: KernelSpec, make: Callable[[torch.device], tuple[Any, ...]], config: str) -> Work:
    """Return what an op launches and costs for the arguments that ``make`` returns for a device.

    ``config`` is the launch configuration that the op is asked for.
    """
    with _MODE:
        arguments = make(torch.device("cpu"))
        flops, moved = spec.flops(*arguments), spec.bytes(*arguments)
        with _recorded() as launches:
            spec.triton_impl(*arguments, **({} if config == "default" else {"config": config}))
    own = tuple(launch for launch in launches if launch.config not in (*TABLE, *TABLE_CHANGES))
    return Work(arguments, own, flops, moved)


def _address(tensor: FakeTensor) -> int:
    return id(tensor)


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them, and let every tensor have an address of its own."""
    launches: list[Launch] = []

    def record(config: Config, grid: tuple[int, ...], *arguments: Any) -> None:
        launches.append(Launch(config, grid))

    own = Config.launch, Config.start
    Config.launch = Config.start = record
    FakeTensor.data_ptr = _address
    try:
        yield launches
    finally:
        Config.launch, Config.start = own
        del FakeTensor.data_ptr
