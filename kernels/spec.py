"""What the tests, the benchmarks and the ahead-of-time compile know of a kernel, and Triton where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton


class _Absent:
    """Stands in for triton where it is not installed: kernels can be defined, not launched."""

    def __getattr__(self, name: str) -> Any:
        return lambda function=None, **options: function or (lambda decorated: decorated)


HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else _Absent()
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else _Absent()

Constants = dict[str, int | bool | str]
Example = Callable[[torch.dtype, torch.device], tuple[Any, ...]]

TRITON_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Config:
    """One shipped way to compile a kernel. Launchers launch nothing else, so what is checked is what runs."""

    kernel: Any
    types: str  # Triton's names for the types of the arguments that are not constexpr, in their order
    constants: Constants
    unaligned: Sequence[str] = ()  # the arguments that are no multiples of 16 even where it is worth being fast
    num_warps: int = 4
    num_stages: int = 2
    async_copies: bool = False  # whether its loads are promised to be asynchronous copies of 16 bytes
    name: str = "default"  # by which the op's ``config=`` asks for it

    def block(self, dimension: str) -> int:
        """How many entries of a dimension one program covers."""
        return int(self.constants[f"BLOCK_{dimension}"])

    def launch(self, grid: tuple[int, ...], *arguments: Tensor | int) -> None:
        """Launch on the current stream, as a node of the graph where one is being traced."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        wrap_triton(self.kernel)[grid](*arguments, **self.constants, **options)

    def start(self, grid: tuple[int, ...], *arguments: Tensor | int | tuple[Any, ...]) -> None:
        """Launch from within an op that tracing does not look into."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[grid](*arguments, **self.constants, **options)


@dataclass(frozen=True)
class KernelSpec:
    """A kernel beside its definition. `fast` and `reference` take the same arguments, of which `examples` makes some.

    Where there are ``tiles``, the op and `fast` take ``tile=`` besides: which launch configuration to use.

    ``examples`` maps the name of a case to a function of a dtype and a device. ``flops`` and ``bytes`` count what the
    definition's mathematics needs: arithmetic operations, and entries read or written at least once, times their size.
    """

    name: str
    triton_impl: Callable[..., Any]
    torch_impl: Callable[..., Any]
    examples: Mapping[str, Example]
    flops: Callable[..., int]
    bytes: Callable[..., int]
    configs: Sequence[Config]
    dtypes: Sequence[torch.dtype] = tuple(TRITON_TYPES)
    mutates: int = 0  # how many of the first arguments it changes in place, instead of returning anything

    @property
    def config_names(self) -> tuple[str, ...]:
        """Return the names of the launch configurations beside the default, which the tuner may choose."""
        return tuple(dict.fromkeys(config.name for config in self.configs if config.name != "default"))


def runs_kernel(*tensors: Tensor) -> bool:
    """Whether a kernel, not the definition, serves these tensors: all on a GPU, none in double precision."""
    return HAS_TRITON and all(x.is_cuda and x.dtype in TRITON_TYPES for x in tensors)


def expect(name: str, x: Tensor, *shape: int) -> None:
    """Raise ValueError unless a tensor has this shape: a kernel would read past the end of a smaller one."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def widen(x: Tensor) -> Tensor:
    """Return half-precision entries in float32, in which every sum over them is taken and returned."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def contiguous(x: Tensor) -> Tensor:
    """Return the tensor with its entries in order; unlike the method, a fake CUDA tensor passes without a GPU."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return the tensor with entries of its last dimension side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 else contiguous(x)


def nbytes(*tensors: Tensor) -> int:
    """Bytes that the entries of some tensors take."""
    return sum(x.numel() * x.element_size() for x in tensors)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Return reproducible standard normal entries, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
