"""How an op is registered with `torch.library`, checks its arguments and chooses its implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import custom_op, triton_op
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .spec import HAS_TRITON, TRITON_TYPES, Config

P = ParamSpec("P")
R = TypeVar("R")


def define_op(
    *, fake: Callable[..., Any] | None = None, mutates: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the op ``tengrad_triton::<its name>``.

    The function is the whole op: it checks its arguments and returns what `dispatch` returns. An op with neither
    ``fake`` nor ``mutates`` is a `triton_op`: tracing enters it and records its launches. Any other op is a
    `custom_op`: tracing records it as one node. A kernel that reads tensors through their addresses needs the second
    kind, because tracing cannot follow an address.

    Args:
        fake: a function of the op's arguments that returns an empty result, from which tracing learns shape and dtype.
        mutates: the names of the arguments that the op changes in place.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = f"tengrad_triton::{function.__name__}"
        if fake is None and not mutates:
            op = triton_op(name, mutates_args=())(function)
        else:
            op = custom_op(name, mutates_args=mutates)(function)
        if fake is not None:
            op.register_fake(fake)
        _FUNCTIONS[op] = partial(_call_eagerly, op, function, len(mutates))
        return cast("Callable[P, R]", op)

    return register


_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def eager(op: Callable[P, R]) -> Callable[P, R]:
    """Return a function that does what an op does, for code that autograd does not record.

    It calls the op only where something looks at ops: a tracer or a dispatch mode. A call through `torch.library` takes
    the host up to 150 µs for lists of tensors.
    """
    return _FUNCTIONS[op]


def _call_eagerly(op: Any, function: Callable[..., R], mutated: int, *arguments: Any, **options: Any) -> R:
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return op(*arguments, **options)
    for tensors in arguments[:mutated]:  # so that autograd refuses a backward that needs the old values
        increment_version(tensors)
    return function(*arguments, **options)


def dispatch(
    triton_impl: Callable[..., R],
    torch_impl: Callable[..., R],
    configs: Sequence[Config],
    config: str,
    *arguments: Any,
    check: Callable[..., object] | None = None,
) -> R:
    """Run an implementation of an op: the kernels where `runs_kernel` allows them, PyTorch elsewhere.

    Args:
        triton_impl: launches the kernels.
        torch_impl: the tuned PyTorch code.
        configs: the launch configurations of the kernels.
        config: the name of the one to launch in.
        arguments: those of the op, without ``config``.
        check: raises `ValueError` unless the arguments' shapes belong together. ``triton_impl`` calls it too, but only
            when it prepares launches: those that it repeats were checked.

    Raises:
        ValueError: no launch configuration has the name ``config``.
    """
    if config != "default":
        _expect_config(configs, config)
    # An op with a check looks at all tensors when it prepares launches.
    looked_at = arguments if check is None else [x[:1] if isinstance(x, list) else x for x in arguments]
    if runs_kernel(*looked_at):
        return triton_impl(*arguments, config=config)
    if check is not None:
        check(*arguments)
    return torch_impl(*arguments)


def _expect_config(configs: Sequence[Config], config: str) -> None:
    names = dict.fromkeys(known.name for known in configs)
    if config not in names:
        raise ValueError(f"config must be one of {', '.join(map(repr, names))}, got {config!r}")


def runs_kernel(*arguments: Any) -> bool:
    """Return whether kernels accept the tensors among the arguments: all must be on a GPU, and none in float64.

    Scalars (tensors without dimensions) may have any dtype: launchers convert them.
    """
    return HAS_TRITON and _are_accepted(arguments)


def _are_accepted(arguments: Sequence[Any]) -> bool:
    for x in arguments:
        if isinstance(x, Tensor):
            if not is_on_gpu(x) or (x.dtype not in TRITON_TYPES and x.dim()):
                return False
        elif isinstance(x, (list, tuple)) and not _are_accepted(x):
            return False
    return True


def is_on_gpu(x: Tensor) -> bool:
    """Return whether a tensor is on a GPU; a stand-in for one replaces this function."""
    return x.is_cuda


def rounds_products(device: torch.device) -> bool:
    """Return whether torch multiplies float32 matrices in TF32 or bfloat16: a setting, but not of every processor."""
    if device.type == "cuda":
        return _rounds_on_gpu()
    if device.type != "cpu" or torch.compiler.is_compiling():
        return False
    setting = str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    return setting in ("tf32", "bf16") and _rounds_on_cpu(setting)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # tracing cannot read settings
def _rounds_on_gpu() -> bool:
    own = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if own == "none" else own) == "tf32"  # type: ignore[attr-defined]


@cache
def _rounds_on_cpu(setting: str) -> bool:
    """Return whether a product shows the setting, which few CPUs follow."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    error = (x @ x.mT - (x.double() @ x.double().mT)).norm() / x.double().square().sum()
    return bool(error > 1e-5)


def expect(name: str, x: Tensor, *shape: int) -> None:
    """Raise ValueError unless a tensor has this shape: a kernel would read past the end of a smaller one."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def widen(x: Tensor) -> Tensor:
    """Return half-precision entries in float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def zeros(x: Tensor, *shape: int) -> Tensor:
    """Return zeros to which products with ``x`` are added: in its dtype, but in float32 at least."""
    return x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def widen_contiguous(x: Tensor) -> Tensor:
    """Return `last_contiguous` entries, half precision in float32."""
    return last_contiguous(widen(x))


def single_contiguous(x: Tensor) -> Tensor:
    """Return contiguous entries in float32; the tensor itself where it has them."""
    return contiguous(x.float())


def contiguous(x: Tensor) -> Tensor:
    """Return the tensor with contiguous entries; unlike `Tensor.contiguous`, this traces CUDA code without a GPU."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def last_contiguous(x: Tensor) -> Tensor:
    """Return the tensor with neighbours along its last dimension adjacent in memory; copy it only if they are not."""
    # A last dimension of one entry may have any stride in a contiguous tensor; the clone's is 1.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
