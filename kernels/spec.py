"""What tests, benchmarks and the tuner know of an op (`KernelSpec`), and how its kernels are launched (`Config`).

Triton is optional: without it the kernels are defined and never launched, and every op runs its PyTorch implementation.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton


class _Absent:
    """A stand-in for triton where it is not installed."""

    def __getattr__(self, name: str) -> Any:
        return lambda function=None, **options: function or (lambda decorated: decorated)


HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else _Absent()
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else _Absent()

Constants = Mapping[str, int | bool]
Example = Callable[[torch.dtype, torch.device], tuple[Any, ...]]

TRITON_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Config:
    """One way to compile and launch a kernel. Launchers use no other, so the tests compile what runs.

    Attributes:
        kernel: the function that `triton.jit` returned.
        types: Triton's type names of the arguments that are not constexpr, in their order, separated by spaces.
        constants: the constexpr arguments.
        unaligned: the arguments that are not multiples of 16 even at sizes where speed matters.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        async_copies: whether the loads must compile to asynchronous copies of 16 bytes on CUDA.
        name: the value of the op's ``config`` argument that selects it.
    """

    kernel: Any
    types: str
    constants: Constants
    unaligned: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 2
    async_copies: bool = False
    name: str = "default"

    def block(self, dimension: str) -> int:
        """Return how many entries of a dimension one program covers."""
        return int(self.constants[f"BLOCK_{dimension}"])

    def launch(self, grid: tuple[int, ...], *arguments: Tensor | int) -> None:
        """Launch on the current stream; tracing records the launch as a node of the graph."""
        self._launch(wrap_triton(self.kernel), grid, arguments)

    def start(self, grid: tuple[int, ...], *arguments: Tensor | int | tuple[Any, ...]) -> None:
        """Launch on the current stream from an op that is opaque to tracing."""
        self._launch(self.kernel, grid, arguments)

    def _launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        kernel[grid](*arguments, **self.constants, **options)


class Tiling(NamedTuple):
    """How a kernel divides its work: constexpr sizes by name, warps of a program and stages of its pipeline."""

    sizes: Constants
    num_warps: int
    num_stages: int


def tiling(num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Tiling:
    """Return a row of a kernel's table of launch configurations."""
    return Tiling(sizes, num_warps, num_stages)


def configs_of(tilings: Mapping[str, Tiling], constants: Constants | None = None, **common: Any) -> dict[str, Config]:
    """Return launch configurations by name: each tiling with the constants and the other fields that all share."""
    return {
        name: Config(
            constants={**(constants or {}), **sizes}, num_warps=num_warps, num_stages=num_stages, name=name, **common
        )
        for name, (sizes, num_warps, num_stages) in tilings.items()
    }


def all_configs(*tables: Mapping[Any, Mapping[str, Config]]) -> tuple[Config, ...]:
    """Return the configurations of tables that are keyed by a variant of the kernel, then by name."""
    return tuple(config for table in tables for by_name in table.values() for config in by_name.values())


@dataclass(frozen=True)
class KernelSpec:
    """An op of this package: its three implementations, inputs to try them with, and what they cost.

    All implementations take the op's arguments except ``config``, which only ``triton_impl`` takes.

    Attributes:
        name: the op's name.
        triton_impl: launches the kernels.
        torch_impl: the tuned PyTorch code that runs on CPU tensors, in float64 and with ``backend="torch"``.
        reference: the definition (see `reference`), for tests only.
        examples: functions of a dtype and a device that return arguments, by the name of the case.
        flops: counts the arithmetic operations that the mathematics needs, given the arguments.
        bytes: counts the bytes that must be read or written at least once, given the arguments.
        configs: every launch configuration of every kernel that ``triton_impl`` launches.
        dtypes: the dtypes that the kernels accept.
        mutates: how many of the first arguments the op changes in place; such an op returns nothing.
    """

    name: str
    triton_impl: Callable[..., Any]
    torch_impl: Callable[..., Any]
    reference: Callable[..., Any]
    examples: Mapping[str, Example]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    configs: Sequence[Config]
    dtypes: Sequence[torch.dtype] = tuple(TRITON_TYPES)
    mutates: int = 0

    @property
    def config_names(self) -> tuple[str, ...]:
        """Return the values of ``config`` other than the default, from which the tuner chooses."""
        return tuple(dict.fromkeys(config.name for config in self.configs if config.name != "default"))


def nbytes(*tensors: Tensor) -> int:
    """Return the bytes of the tensors' entries."""
    return sum(x.numel() * x.element_size() for x in tensors)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Return reproducible standard normal entries, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
