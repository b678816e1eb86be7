"""The description of an op for tests, benchmarks and the tuner (`KernelSpec`), and launch configurations (`Config`).

Triton is optional: without it the kernels are defined and never launched, and every op runs its PyTorch implementation.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import Parameter


class _Absent:
    """A stand-in for triton where it is not installed."""

    def __getattr__(self, name: str) -> Any:
        return lambda function=None, **options: function or (lambda decorated: decorated)


HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else _Absent()
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else _Absent()

Constants = Mapping[str, int | bool | str]
Example = Callable[[torch.dtype, torch.device], tuple[Any, ...]]

TRITON_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FLOATING = tuple(TRITON_TYPES)
"""The dtypes that most kernels accept."""

TF32X3 = "tf32x3"
"""The name of launch configurations in which tensor cores multiply float32: three products of two parts in TF32.

Its error is that of float32, at most `TF32X3_ERROR` of the factors' norms. In bfloat16, three products have ten times
that.
"""
TF32X3_ERROR = 1e-6


@dataclass(frozen=True)
class Config:
    """One way to compile and launch a kernel: a launch configuration.

    Every launch goes through a `Config` that its `KernelSpec` lists, so the tests compile exactly what runs.

    Attributes:
        kernel: the function that `triton.jit` returned.
        types: Triton's type names of the arguments that are not constexpr, in their order, separated by spaces.
        constants: the constexpr arguments.
        unaligned: the arguments that need not be multiples of 16, even where speed matters; all others are compiled as
            multiples of 16.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        async_copies: whether the loads must compile to asynchronous copies of 16 bytes on CUDA.
        name: the value of the op's ``config`` argument that selects it. `TF32X3` is the one whose matrix products
            are not those of float32.
    """

    kernel: Any
    types: str
    constants: Constants
    unaligned: Sequence[str]
    num_warps: int
    num_stages: int
    async_copies: bool
    name: str

    @property
    def backends(self) -> tuple[str, ...]:
        """Return for which of Triton's backends it compiles: AMD's has no TF32 products in three parts."""
        return ("cuda",) if self.name == TF32X3 else ("cuda", "hip")

    def block(self, dimension: str) -> int:
        """Return BLOCK_<dimension>: how many entries of a dimension one program covers."""
        return int(self.constants[f"BLOCK_{dimension}"])

    def launch(self, grid: tuple[int, ...], *arguments: Tensor | int) -> None:
        """Launch on the tensors' device; tracing records the launch as a node of the graph."""
        if _is_traced(arguments):
            self._launch(wrap_triton(self.kernel), grid, arguments)
        else:
            _repeated(self, grid, arguments).start(grid, *arguments)

    def start(self, grid: tuple[int, ...], *arguments: Tensor | int | tuple[Any, ...]) -> Any:
        """Launch on the tensors' device, from an op that is opaque to tracing; return what Triton compiled."""
        with device_of(*arguments):
            # Triton 3.10 will add and multiply apart by default, in twice the instructions.
            return self._launch(self.kernel, grid, arguments, enable_fp_fusion=True)

    def _launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: bool) -> Any:
        return kernel[grid](
            *arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages, **options
        )


def _is_traced(arguments: Sequence[Any]) -> bool:
    """Return whether a launch is only to be recorded: tensors that stand for others are instances of subclasses."""
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, Parameter) for x in arguments)


def device_of(*arguments: Any) -> AbstractContextManager[Any]:
    """Return a context in which the GPU of the first tensor is the current one: Triton launches on that."""
    for x in arguments:
        if isinstance(x, Tensor):
            is_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
            return nullcontext() if is_current else torch.cuda.device(x.device)
    raise TypeError("a launch needs a tensor, got none")


class Repeated:
    """Launches of one configuration on one GPU, for arguments that do not differ in their types and alignments.

    Triton looks for the compiled kernel at the first launch only. That takes the host longer than the launch.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._constants = [config.constants[name] for name in config.kernel.arg_names if name in config.constants]
        self._grid: tuple[int, ...] = ()
        self._compiled: Any = None  # stays None under Triton's interpreter
        self._launcher: Any = None  # of the compiled kernel, for the grid

    def start(self, grid: tuple[int, ...], *arguments: Tensor | int | tuple[Any, ...]) -> None:
        """Launch as `Config.start` does."""
        if self._compiled is None:
            self._compiled = self._config.start(grid, *arguments)
            return
        with device_of(*arguments):
            if grid != self._grid:
                self._grid, self._launcher = grid, self._compiled[(*grid, 1, 1)[:3]]
            self._launcher(*arguments, *self._constants)


_MOST_REPEATED = 256
_known: dict[Hashable, Repeated] = {}


def _repeated(config: Config, grid: tuple[int, ...], arguments: Sequence[Any]) -> Repeated:
    """Return what earlier launches with such arguments used: equal numbers, and tensors that differ by address only."""
    key = (id(config), grid, *[_layout(x) if isinstance(x, Tensor) else x for x in arguments])
    if key not in _known:
        if len(_known) >= _MOST_REPEATED:
            _known.clear()
        _known[key] = Repeated(config)
    return _known[key]


def _layout(x: Tensor) -> Hashable:
    return x.device, x.dtype, x.shape, x.data_ptr() % 16, x.untyped_storage().nbytes()


class Tiling(NamedTuple):
    """The part of a launch configuration that tuning varies.

    Attributes:
        sizes: the constexpr sizes by name, such as BLOCK_N.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
    """

    sizes: Constants
    num_warps: int
    num_stages: int


def tiling(num_warps: int = 4, num_stages: int = 2, **sizes: int) -> Tiling:
    """Return a `Tiling`; ``sizes`` are the constexpr sizes by name."""
    return Tiling(sizes, num_warps, num_stages)


def configs_of(
    tilings: Mapping[str, Tiling],
    kernel: Any,
    types: str,
    *,
    constants: Constants = MappingProxyType({}),
    unaligned: Sequence[str] = (),
    async_copies: bool = False,
) -> dict[str, Config]:
    """Return a kernel's launch configurations by name: one for each tiling. The other arguments are common to all.

    Args:
        tilings: the tilings by the names of the configurations.
        kernel: as for `Config`.
        types: as for `Config`.
        constants: the constexpr arguments that are not in the tilings.
        unaligned: as for `Config`.
        async_copies: as for `Config`.
    """
    return {
        name: Config(kernel, types, {**constants, **sizes}, unaligned, num_warps, num_stages, async_copies, name)
        for name, (sizes, num_warps, num_stages) in tilings.items()
    }


def single_config(
    kernel: Any, types: str, chosen: Tiling, unaligned: Sequence[str] = (), async_copies: bool = False
) -> Config:
    """Return the only launch configuration of a kernel; its name is ``"default"``."""
    configs = configs_of({"default": chosen}, kernel, types, unaligned=unaligned, async_copies=async_copies)
    return configs["default"]


def config_named(configs: Mapping[str, Config], name: str) -> Config:
    """Return the configuration of this name, or the default one for a variant of the kernel that has none."""
    return configs.get(name, configs["default"])


def in_tf32x3(num_warps: int, num_stages: int, **sizes: int) -> dict[str, Tiling]:
    """Return the tiling of the configuration `TF32X3`, by its name."""
    return {TF32X3: Tiling({**sizes, "PRECISION": TF32X3}, num_warps, num_stages)}


def all_configs(*tables: Mapping[Any, Mapping[str, Config]]) -> tuple[Config, ...]:
    """Return all configurations of some tables; a table has the variants of a kernel as keys, and then the names."""
    return tuple(config for table in tables for by_name in table.values() for config in by_name.values())


@dataclass(frozen=True)
class KernelSpec:
    """An op of this package: its three implementations, example arguments, and costs.

    All implementations take the op's arguments except ``config``, which only ``triton_impl`` takes.

    Attributes:
        name: the op's name.
        triton_impl: launches the kernels.
        torch_impl: the tuned PyTorch code that runs on CPU tensors, in float64 and with ``backend="torch"``.
        reference: the definition (see `reference`), for tests only.
        examples: for each case, by its name, a function of a dtype and a device that returns arguments of the op.
        flops: a function of the arguments that returns how many arithmetic operations the mathematics needs.
        bytes: a function of the arguments that returns how many bytes must be read or written at least once.
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
    dtypes: Sequence[torch.dtype]
    mutates: int

    @property
    def config_names(self) -> tuple[str, ...]:
        """Return the values of ``config`` other than the default, from which the tuner chooses."""
        return self.names_for("cuda")

    def names_for(self, backend: str) -> tuple[str, ...]:
        """Return those of `config_names` that one of Triton's backends can compile.

        Args:
            backend: ``"cuda"`` or ``"hip"``.
        """
        names = (config.name for config in self.configs if config.name != "default" and backend in config.backends)
        return tuple(dict.fromkeys(names))


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
