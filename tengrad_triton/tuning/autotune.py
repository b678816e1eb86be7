"""Measure, on this device, every way to serve every weight of a model: representation by kernel.

A candidate is measured by what it would do: its refresh and its step run once with kernels that remember their
arguments, and each of those calls is then timed with every implementation that passes its test.
"""

from __future__ import annotations

import copy
import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tengrad_triton import kernels
from tengrad_triton.capture.blocks import find_layer_params, find_captured_layers, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.build import jacobian_of
from tengrad_triton.curvature.choices import Representation
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.jacobian import Jacobian
from tengrad_triton.curvature.refresh import gather, geometries_of
from tengrad_triton.curvature.target import Target
from tengrad_triton.curvature.woodbury import directions
from tengrad_triton.likelihoods import LIKELIHOODS
from tengrad_triton.tuning import plan_file
from tengrad_triton.tuning.plan import Measured, Plan

EXACT: tuple[Representation, ...] = ("factored", "per_sample")
TOL, DAMPING = 0.01, 0.1
Progress = Callable[[int, int, str], None]


def autotune(
    model: nn.Module,
    example_input: Tensor,
    loss_fn: Callable[[Any], Tensor] | None = None,
    *,
    representations: Sequence[Representation] = EXACT,
    tol: float = TOL,
    damping: float = DAMPING,
    seconds: float = 0.2,
    path: Path | str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Measure every weight's candidates on the model's device and keep them in the device's plan file.

    The model is copied; a forward and a backward of the copy give the layers' real inputs.

    Args:
        model: as it will be trained.
        example_input: a batch of the size that it will be trained with.
        loss_fn: makes a scalar of the output; the mean of its squares by default. Times do not depend on its values.
        representations: to try. ``"per_sample_bf16"`` rounds J; ``"compressed"`` drops directions of it, as many as
            ``tol`` lets go of this batch's rows; the others are exact.
        tol: of ``"compressed"``, as it will be trained with.
        damping: as it will be trained with; how many directions ``tol`` keeps depends on it.
        seconds: to spend on each kernel of each candidate, shared by PyTorch and the launch configurations that can run
            it. Compiling these comes on top.
        path: of the plan file; the device's own in the user's cache folder by default.
        progress: called with (weights done, weights in all, the name of the next one).

    Raises:
        ValueError: there is no weight to tune.
    """
    twin = copy.deepcopy(model)
    uses = _uses_of(twin, example_input, loss_fn or (lambda output: output.square().mean()))
    geometries = {name: g for name, g in geometries_of(uses).items() if g.layout != "table"}  # no kernels serve one
    if not geometries:
        raise ValueError(
            f"no weight of {type(model).__name__} multiplies what its layer sees: there is nothing to tune"
        )
    flat = {full_name(name, label): use for name, block in uses.items() for label, use in block.items()}
    weights = {geometry.key: name for name, geometry in geometries.items()}  # equal geometries are measured once
    device = example_input.device
    entries = {}
    for done, (key, name) in enumerate(weights.items()):
        if progress is not None:
            progress(done, len(weights), name)
        parameter = dict(twin.named_parameters())[name].detach()
        entries[key] = {
            representation: measured
            for representation in representations
            if (measured := _measured(name, flat[name], representation, parameter, seconds, (tol, damping))) is not None
        }
    found = Plan({key: entry for key, entry in entries.items() if entry})
    return plan_file.save(found, Path(path) if path is not None else plan_file.default_path(device), device)


def _uses_of(model: nn.Module, x: Tensor, loss_fn: Callable[[Any], Tensor]) -> dict[str, Mapping[str, Contributions]]:
    blocks = find_layer_params(model, [{"params": list(model.parameters())}])
    sources = find_captured_layers(model, blocks)
    capture = Capture(model, sources, "empirical", LIKELIHOODS["gaussian"], torch.Generator(x.device))
    capture.arm()
    loss_fn(model(x)).backward()
    uses, _ = gather(blocks, capture)
    capture.disarm()
    return uses


def _measured(
    name: str,
    uses: Contributions,
    representation: Representation,
    parameter: Tensor,
    seconds: float,
    accuracy: tuple[float, float],
) -> Measured | None:
    """Return a candidate's times, or None, with a warning, where it cannot run."""
    try:
        calls, nbytes, extra = _calls_of(uses, representation, parameter, accuracy)
        times = {kernel: _times(kernel, args, seconds) for kernel, args in calls.items()}
        on_gpu = parameter.is_cuda
        times |= {name: {"torch": _median_seconds(call, seconds, on_gpu)} for name, call in extra.items()}
        return Measured(times, nbytes)
    except (RuntimeError, ValueError, MemoryError) as error:  # torch's out-of-memory is a RuntimeError
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{name}: {representation} is left out: {reason}", stacklevel=3)
        return None


def _calls_of(
    uses: Contributions, representation: Representation, parameter: Tensor, accuracy: tuple[float, float]
) -> tuple[dict[str, tuple[Any, ...]], int, dict[str, Callable[[], Any]]]:
    """Return the arguments with which a refresh and a step call each kernel, the bytes stored between them, and what
    else a refresh does, by name.
    """
    calls: dict[str, tuple[Any, ...]] = {}
    extra: dict[str, Callable[[], Any]] = {}

    def remembering(spec: kernels.KernelSpec) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[spec.name] = args
            return spec.reference(*args)  # whatever Triton has to say of the others

        return call

    ops = SimpleNamespace(kernel_overrides=(), **{spec.name: remembering(spec) for spec in kernels.SPECS})
    rows = jacobian_of(uses, representation, ops)
    k_NN = rows.gram()
    if representation == "compressed":
        tol, damping = accuracy
        compress, seen = partial(_compressed, rows, k_NN, len(k_NN) * damping, tol), dict(calls)
        rows, extra = compress(), {"compress": compress}
        calls = seen  # what kernels do within that is part of its time
    rows.project(parameter)
    settings = k_NN.new_tensor([1e-3, 0.9, 0.0, 0.0])
    target = Target("", "", parameter.clone(), torch.zeros_like(parameter), parameter.clone(), settings, False)
    rows.expand_update_(target, k_NN[0], k_NN.new_ones(()))
    return calls, rows.nbytes, extra


def _compressed(rows: Jacobian, k_NN: Tensor, shift: float, tol: float) -> Jacobian:
    return rows.combined(directions(k_NN, shift, tol)[0])


def _times(kernel: str, args: tuple[Any, ...], seconds: float) -> dict[str, float]:
    """Return the median seconds of one call, by who runs it: forever, where Triton's default was dropped."""
    spec = next(spec for spec in kernels.SPECS if spec.name == kernel)
    on_gpu = _device_of(args).type == "cuda"
    calls = {"torch": spec.reference, **(_configurations(spec, args) if on_gpu else {})}
    share = seconds / len(calls)
    times = {name: _median_seconds(partial(call, *args), share, on_gpu) for name, call in calls.items()}
    return {"triton": math.inf, **times} if on_gpu else times  # what no plan names runs by default


def _configurations(spec: kernels.KernelSpec, args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """Return the op in each launch configuration whose error is at most twice PyTorch's, both against float64.

    Any other is dropped with a warning: one that does not compile, or takes more than the device has, too.
    """
    op, error = getattr(kernels, spec.name), _error_of(spec, args)
    allowed, passed = 2 * error(spec.reference), {}
    for name, call in {"triton": op, **{tile: partial(op, tile=tile) for tile in spec.tiles}}.items():
        try:
            found = error(call)
        except Exception as failure:  # a compiler's errors have no base in common
            reason = str(failure).partition("\n")[0]
            warnings.warn(f"{spec.name} ({name}) is dropped: {reason}", stacklevel=6)
            continue
        if found <= allowed:
            passed[name] = call
        else:
            warnings.warn(f"{spec.name} ({name}) is less exact than PyTorch's here: it is dropped", stacklevel=6)
    return passed


def _device_of(args: tuple[Any, ...]) -> torch.device:
    return next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def _median_seconds(call: Callable[[], Any], seconds: float, on_gpu: bool) -> float:
    if on_gpu:  # with a cold L2 cache, which the rest of a training step leaves behind too
        do_bench = importlib.import_module("triton.testing").do_bench
        return float(do_bench(call, warmup=25, rep=1e3 * seconds, return_mode="median")) / 1e3
    call()
    take_rows: list[float] = []
    while len(take_rows) < 3 or (sum(take_rows) < seconds and len(take_rows) < 100):
        start = time.perf_counter()
        call()
        take_rows.append(time.perf_counter() - start)
    return statistics.median(take_rows)


def _error_of(spec: kernels.KernelSpec, args: tuple[Any, ...]) -> Callable[[Callable[..., Any]], float]:
    """Return a function that gives an implementation's error against the definition in float64."""

    def outputs(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        changed = tree_map_only(Tensor, torch.clone, list(arguments[: spec.mutates]))
        result = function(*changed, *arguments[spec.mutates :])
        return tree_leaves(changed if spec.mutates else result)

    exact = outputs(spec.reference, tree_map_only(Tensor, _in_float64, list(args)))

    def error(function: Callable[..., Any]) -> float:
        found = outputs(function, args)
        return math.hypot(*((x.double() - truth).norm().item() for x, truth in zip(found, exact, strict=True)))

    return error


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
