"""Measure, on this device, every choice for every weight of a model: each representation with each kernel.

For each candidate, one refresh and one step run with ops that record their arguments. Then each recorded call is timed
with every implementation that is exact enough.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton import kernels
from tengrad_triton.capture.blocks import find_captured_layers, find_layer_params, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.options import CaptureOptions
from tengrad_triton.curvature.choices import Representation
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.contributions import Contributions, gather
from tengrad_triton.curvature.geometry import EMBEDDING
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.refresh import jacobian_of
from tengrad_triton.curvature.target import Target
from tengrad_triton.curvature.woodbury import directions
from tengrad_triton.files import reason
from tengrad_triton.likelihoods import LIKELIHOODS
from tengrad_triton.tuning import plan_file
from tengrad_triton.tuning.measure import kernel_seconds, median_seconds
from tengrad_triton.tuning.plan import Measured, Plan

EXACT: tuple[Representation, ...] = ("factored", "per_sample")
TOL, DAMPING = 0.01, 0.1  # the default ``tol`` of `TENGraD`, and the ``damping`` of `TENGraD.paper`
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
    """Measure the candidates of every weight on the model's device, and save the times in the device's plan file.

    One forward and one backward of a copy of the model give the layers' inputs and output gradients.

    Args:
        model: the model to tune for, in the mode and dtype of the training.
        example_input: an input of the batch size of the training.
        loss_fn: returns any scalar of the output, because its value does not matter; the mean of squares by default.
        representations: the representations to measure. ``"factored"`` and ``"per_sample"`` are exact.
            ``"per_sample_bf16"`` rounds J, and ``"compressed"`` drops the part of J that ``tol`` allows (M7).
        tol: the setting ``tol`` of the training, which only ``"compressed"`` uses.
        damping: α of the training; the size of a ``"compressed"`` J depends on it.
        seconds: the time, in seconds, for each kernel of each candidate, shared by its implementations. Compiling takes
            additional time.
        path: the path of the plan file, which is made or extended; by default the device's file in the user's cache
            folder. A plan of this kind of device is extended or, if other versions measured it, replaced.
        progress: called with (the number of measured weights, the number of all weights, the next weight's name).

    Returns:
        the whole plan of the plan file, for ``TENGraD(plan=…)``. If the file cannot be written although it could be
        before the measurements, as on a disk that became full, the new measurements alone, with a warning.

    Raises:
        ValueError: there is no weight to tune, or ``path`` cannot be written or holds something else than a plan of
            this kind of device. This is raised before anything is measured, and what is there stays as it is.
        TypeError: ``model`` is no module, or ``example_input`` no tensor.
    """
    _check_types(model, example_input)
    device = example_input.device
    file = Path(path) if path is not None else plan_file.default_path(device)
    plan_file.check_target(file, device)
    plan = measured_plan(model, example_input, loss_fn, representations, (tol, damping), seconds, progress)
    try:
        return plan_file.save(plan, file, device)
    except (OSError, ValueError) as error:
        warnings.warn(f"the plan is not saved in {file}: {reason(error)}", stacklevel=2)
        return plan


def _check_types(model: Any, example_input: Any) -> None:
    for name, value, wanted in (("model", model, nn.Module), ("example_input", example_input, Tensor)):
        if not isinstance(value, wanted):
            raise TypeError(f"{name} must be a torch {wanted.__name__}, got {type(value).__name__}")


def measured_plan(
    model: nn.Module,
    example_input: Tensor,
    loss_fn: Callable[[Any], Tensor] | None,
    representations: Sequence[Representation],
    accuracy: tuple[float, float],
    seconds: float,
    progress: Progress | None,
) -> Plan:
    """Return the measurements of a model without a file; arguments as in `autotune`, ``accuracy`` is (tol, damping)."""
    twin = copy.deepcopy(model)
    contributions = _contributions(twin, example_input, loss_fn or (lambda output: output.square().mean()))
    geometries = {name: g for name, g in contributions.geometries().items() if g.layout != EMBEDDING}
    if not geometries:
        raise ValueError(f"no weight of {type(model).__name__} multiplies its layer's input: there is nothing to tune")
    by_weight = {
        full_name(name, param_name): batches
        for name, layer in contributions.by_layer.items()
        for param_name, batches in layer.items()
    }
    weights = {geometry.key: name for name, geometry in geometries.items()}  # equal geometries are measured once
    entries = {}
    for done, (key, name) in enumerate(weights.items()):
        if progress is not None:
            progress(done, len(weights), name)
        parameter = dict(twin.named_parameters())[name].detach()
        candidate = partial(_measured, name, by_weight[name], parameter, seconds, accuracy)
        measured = {representation: candidate(representation) for representation in representations}
        entries[key] = {representation: times for representation, times in measured.items() if times is not None}
    return Plan({key: entry for key, entry in entries.items() if entry})


def _contributions(model: nn.Module, x: Tensor, loss_fn: Callable[[Any], Tensor]) -> Contributions:
    layers = find_layer_params(model, [{"params": list(model.parameters())}], rows_without_rule=False)
    captured = find_captured_layers(model, layers)
    capture = Capture(model, captured, CaptureOptions("empirical", LIKELIHOODS["gaussian"]), torch.Generator(x.device))
    capture.arm()
    loss_fn(model(x)).backward()
    contributions, _ = gather(layers, capture, release_calls=False)
    capture.disarm()
    return contributions


def _measured(
    name: str,
    batches: MicroBatches,
    parameter: Tensor,
    seconds: float,
    accuracy: tuple[float, float],
    representation: Representation,
) -> Measured | None:
    """Return a candidate's times, or None, with a warning, if it cannot run."""
    try:
        calls, nbytes, others = _kernel_calls(batches, representation, parameter, accuracy)
        times = {kernel: kernel_seconds(kernel, args, seconds) for kernel, args in calls.items()}
        device = parameter.device
        times |= {name: {"torch": median_seconds(call, seconds, device)} for name, call in others.items()}
        return Measured(times, nbytes)
    except (RuntimeError, ValueError, MemoryError) as error:  # torch's out-of-memory error is a RuntimeError
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{representation} of {name} is not measured: {reason}", stacklevel=3)
        return None


def _kernel_calls(
    batches: MicroBatches, representation: Representation, parameter: Tensor, accuracy: tuple[float, float]
) -> tuple[dict[str, tuple[Any, ...]], int, dict[str, Callable[[], Any]]]:
    """Return the arguments of each kernel call, the bytes stored, and other calls of a refresh to be timed."""
    calls: dict[str, tuple[Any, ...]] = {}
    others: dict[str, Callable[[], Any]] = {}

    def storing(spec: kernels.KernelSpec) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[spec.name] = args
            return spec.torch_impl(*args)  # the implementation that runs on every device

        return call

    ops = SimpleNamespace(kernel_overrides=(), **{spec.name: storing(spec) for spec in kernels.SPECS})
    jacobian = jacobian_of(batches, representation, ops)
    k_NN = jacobian.gram()
    if representation == "compressed":
        tol, damping = accuracy
        compress, before = partial(_compressed, jacobian, k_NN, len(k_NN) * damping, tol), dict(calls)
        jacobian, others = compress(), {"compress": compress}
        calls = before  # kernels within the compression are part of its time
    jacobian.project(parameter)
    settings = k_NN.new_tensor([1e-3, 0.9, 0.0, 0.0])
    state = (parameter.clone(), torch.zeros_like(parameter), settings)
    target = Target("", "", *state, nesterov=False, spring=0.0, rate=0, group=0)
    jacobian.expand_update_(target, parameter.clone(), k_NN[0], k_NN.new_ones(()))
    return calls, jacobian.nbytes, others


def _compressed(jacobian: Jacobian, k_NN: Tensor, shift: float, tol: float) -> Jacobian:
    return jacobian.combine(directions(k_NN, shift, tol)[0])
