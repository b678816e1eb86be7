"""The time and the error of every implementation of a kernel, for the arguments of a real call."""

from __future__ import annotations

import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tengrad_triton import kernels
from tengrad_triton.kernels.spec import TF32X3, TF32X3_ERROR


def kernel_seconds(kernel: str, args: tuple[Any, ...], seconds: float) -> dict[str, float]:
    """Return the median seconds of one call with each implementation.

    On a GPU the implementations are ``"torch"``, ``"triton"`` and the names of the other launch configurations, except
    those that fail or are less exact than PyTorch. If ``"triton"`` is such a one, its time is infinite. On a CPU there
    is only ``"torch"``.
    """
    spec = next(spec for spec in kernels.SPECS if spec.name == kernel)
    device = _device_of(args)
    on_gpu = device.type == "cuda"
    calls = {"torch": spec.torch_impl, **(_exact_configurations(spec, args) if on_gpu else {})}
    share = seconds / len(calls)
    times = {name: median_seconds(partial(call, *args), share, device) for name, call in calls.items()}
    return {"triton": math.inf, **times} if on_gpu else times


def _device_of(args: tuple[Any, ...]) -> torch.device:
    return next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def median_seconds(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Return the median seconds of a call on a device, which is repeated for about ``seconds``."""
    if device.type == "cuda":  # do_bench clears the L2 cache, as the rest of a training step does
        do_bench = importlib.import_module("triton.testing").do_bench
        with torch.cuda.device(device):  # its events are those of the current GPU
            return float(do_bench(call, warmup=25, rep=1e3 * seconds, return_mode="median")) / 1e3
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _exact_configurations(spec: kernels.KernelSpec, args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """Return the op in each launch configuration whose error is at most twice PyTorch's, both against float64.

    In the configuration `TF32X3` it may be `TF32X3_ERROR`, for which `within_damping` allows. Any other configuration
    is dropped with a warning. So is one that does not compile, or that needs more shared memory
    or registers than the device has.
    """
    op, error = getattr(kernels, spec.name), error_of(spec, args)
    of_torch, passed = error(spec.torch_impl), {}
    backend = "hip" if torch.version.hip else "cuda"
    for name, call in {"triton": op, **{name: partial(op, config=name) for name in spec.names_for(backend)}}.items():
        try:
            with _new_memory_is_nan():
                found = error(call)
        except Exception as failure:  # the errors of a compiler have no common base class
            reason = str(failure).partition("\n")[0]
            warnings.warn(f"{spec.name} ({name}) is dropped: {reason}", stacklevel=6)
            continue
        if found <= 2 * of_torch or (name == TF32X3 and found <= TF32X3_ERROR):
            passed[name] = call
        else:
            warnings.warn(f"{spec.name} ({name}) is dropped: its error is more than twice PyTorch's", stacklevel=6)
    return passed


@contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """Fill uninitialized memory with NaN: a kernel that stores nothing would else find an earlier kernel's results."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def error_of(spec: kernels.KernelSpec, args: tuple[Any, ...]) -> Callable[[Callable[..., Any]], float]:
    """Return a function from an implementation to its error, as a share of the result of PyTorch in float64.

    The op's definition is not the reference here, because it would form the explicit rows of large layers.
    """

    def outputs(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        changed = tree_map_only(Tensor, torch.clone, list(arguments[: spec.mutates]))
        result = function(*changed, *arguments[spec.mutates :])
        return tree_leaves(changed if spec.mutates else result)

    exact = outputs(spec.torch_impl, tree_map_only(Tensor, _in_float64, list(args)))

    def error(function: Callable[..., Any]) -> float:
        found = outputs(function, args)
        differences = [x.double() - truth for x, truth in zip(found, exact, strict=True)]
        return _norm(differences) / _norm(exact)

    return error


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(x.norm().item() for x in tensors))


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
