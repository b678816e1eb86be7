"""The training step as one compiled function: forward, capture, backward, refresh or reuse, update.

There are two compiled functions: one reuses the curvature, the other one refreshes it. Python chooses between them.
Both compute the same as the plain step with the same parts (contributions, Jacobians, Woodbury, update), but they use
`torch.func.vjp` instead of hooks and autograd's graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from tengrad_triton.capture.rerun import ignore_vmap_warning
from tengrad_triton.compiled.functional_capture import FunctionalCapture
from tengrad_triton.compiled.graphs import STATIC_SETTINGS, LossFn, StepFunctions, StepState
from tengrad_triton.compiled.static_buffers import StaticBuffers, mark_static
from tengrad_triton.compiled.trace_spec import (
    NO_CAPTURE,
    NOT_SEEN,
    SpecOrReason,
    TraceSpec,
    trace_spec_of,
    why_not_compiled,
)
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.kernels import without_memory
from tengrad_triton.likelihoods import Reparametrized
from tengrad_triton.optim.step_access import StepAccess
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.optim.validation import check_loss
from tengrad_triton.tuning.precision import without_tf32x3

logger = logging.getLogger(__name__)
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that capture CUDA graphs."""


def compile_train_step(
    model: nn.Module, loss_fn: LossFn, optimizer: TENGraD, *, mode: str | None = None, backend: str = "inductor"
) -> TrainStep:
    """Return ``train_step(x, y) -> loss``, which does what the plain loop does for one batch, as one compiled function.

    The first step is a plain step, which shows the sizes of all tensors. The function that reuses the curvature is
    compiled at the next step, the function that refreshes it at the next refresh. Model, optimizer and ``state_dict``
    stay ordinary: plain and compiled steps can follow each other in any order. A batch of another size takes the plain
    step, and so does a refresh that cannot be compiled; ``train_step.why_plain`` says why.

    Args:
        model: the optimizer's model, which takes ``x``.
        loss_fn: takes the model's output and ``y``; returns a scalar mean over the samples.
        optimizer: the optimizer of that model.
        mode: the mode of `torch.compile`. With ``"reduce-overhead"``, which replays CUDA graphs, J keeps its address:
            each refresh copies the new J into the old tensors.
        backend: the backend of `torch.compile`.

    Raises:
        ValueError: the optimizer belongs to another model.
        TypeError: the optimizer is not a `TENGraD`.
    """
    if not isinstance(optimizer, TENGraD):
        raise TypeError(
            f"optimizer must be a TENGraD, got {type(optimizer).__name__}: compile the model by torch.compile, and the "
            "step of a baseline by its compile_step()"
        )
    if optimizer.model is not model:
        raise ValueError("the optimizer belongs to another model: pass the one that it was made with")
    return TrainStep(loss_fn, StepAccess(optimizer), mode, backend)


@dataclass(frozen=True)
class CompiledSteps:
    """The compiled functions, and the batch and the specification that they were made for.

    Attributes:
        batch: the shapes and dtypes of x and y.
        output: a tensor like the model's output, to draw noise for.
        spec: the specification of the refresh, or why refreshes are not compiled.
        functions: the functions before their compilation.
        reuse: the compiled `StepFunctions.reuse`.
        refresh: the compiled `StepFunctions.refresh`.
    """

    batch: Any
    output: Tensor
    spec: SpecOrReason
    functions: StepFunctions
    reuse: Callable[..., Any]
    refresh: Callable[..., Any]


@dataclass
class _FirstEvaluation:
    """The first evaluation of a plain step's closure; ``trained`` names the parameters with a gradient."""

    output: Tensor
    spec: SpecOrReason
    trained: frozenset[str]


class TrainStep:
    """A training step, made by `compile_train_step`; call it with a batch.

    Attributes:
        why_plain: why refreshes take the plain step; None if they are compiled.
    """

    def __init__(self, loss_fn: LossFn, access: StepAccess, mode: str | None, backend: str) -> None:
        self._model, self._loss_fn, self._access = access.module, loss_fn, access
        self._compile_options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._mode = mode
        self._buffers = StaticBuffers() if mode in _CUDA_GRAPH_MODES else None
        self._buffered: Curvature | None = None  # the curvature whose tensors are in the buffers
        self._steps: CompiledSteps | None = None
        self._warned = False
        self._untraceable: str | None = None  # why the refresh could not be traced

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step with a batch; return its loss, a scalar, from before the step.

        Args:
            x: the model's input, samples first.
            y: the target of ``loss_fn``, samples first.

        Raises:
            ValueError: ``loss_fn`` returned no scalar, or no mean over the samples.
            RuntimeError: the model or the loss cannot be traced in one graph.
        """
        due, steps, curvature = self._access.refresh_is_due, self._steps, self._access.curvature
        if steps is not None and steps.functions.captured is not self._access.capture.layers:
            self._steps = steps = None  # `add_param_group` has changed the layers
        if steps is None or not self._fits(steps, x, y):
            return self._plain(x, y)
        refreshes = due and self.why_plain is None
        reuses = not due and curvature is not None and self._is_from_batches_of(len(x), curvature)
        if not refreshes and not reuses:
            return self._plain(x, y)
        self._access.detach_hooks()
        try:
            with torch.no_grad():
                return self._compiled_refresh(steps, x, y) if due else self._compiled_reuse(steps, x, y)
        except TorchDynamoException as error:
            self._access.attach_hooks_if_due()
            if due:
                return self._plain_from_now_on(error, x, y)
            raise RuntimeError(
                f"the step cannot be traced in one graph: {error}\nThe plain loop (zero_grad, forward, backward, "
                "optimizer.step()) does the same without compilation"
            ) from error

    @property
    def why_plain(self) -> str | None:
        """Return why refreshes take the plain step; None if they are compiled."""
        if self._untraceable is not None or self._steps is None:
            return self._untraceable or "no step was taken yet"
        spec = self._steps.spec
        return spec if isinstance(spec, str) else None

    def _plain_from_now_on(self, error: Exception, x: Tensor, y: Tensor) -> Tensor:
        self._untraceable = f"the refresh cannot be traced in one graph: {error}"
        first_line = self._untraceable.splitlines()[0]
        warnings.warn(f"refreshes take the plain step ({first_line}); see train_step.why_plain", stacklevel=3)
        return self._plain(x, y)

    def _is_from_batches_of(self, samples: int, curvature: Curvature) -> bool:
        """Whether the number of rows fits batches of this size. Any other number would trigger a recompilation."""
        return curvature.rows % samples == 0 or curvature.rows == self._access.options.fisher_rows

    def _fits(self, steps: CompiledSteps, x: Tensor, y: Tensor) -> bool:
        """Whether the compiled functions are for batches like this one; warns once if they are not."""
        batch = _signature(x, y)
        if batch != steps.batch and not self._warned:
            self._warned = True
            warnings.warn(f"compiled for {steps.batch}: a batch of {batch} takes the plain step", stacklevel=3)
        return batch == steps.batch

    # The plain step, from which the compiled functions are made

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        before, first = self._steps, None
        wants_spec = before is None or (isinstance(before.spec, str) and before.batch == _signature(x, y))

        def closure() -> Tensor:
            nonlocal first
            self._access.zero_grad()
            output = self._model(x)
            loss = self._loss_fn(output, y)
            if before is None and first is None:
                check_loss(self._loss_fn, output, y, loss)
            loss.backward()
            if first is None:
                spec = self._trace_spec() if wants_spec else NOT_SEEN
                trained = frozenset(name for name, p in self._model.named_parameters() if p.grad is not None)
                first = _FirstEvaluation(output.detach(), spec, trained)
            return loss.detach()

        loss = self._access.plain_step(closure)
        self._access.zero_grad()
        seen = cast("_FirstEvaluation", first)
        spec = why_not_compiled(self._access) or seen.spec
        if before is None or (wants_spec and isinstance(spec, TraceSpec)):
            self._compile(x, y, spec, seen)
        elif wants_spec and spec != NOT_SEEN:
            self._steps = replace(before, spec=spec)
        return loss

    def _trace_spec(self) -> SpecOrReason:
        """Return the specification of the forward and backward that were just captured, or why there is none."""
        capture = self._access.capture
        if len(capture.records) != 1:
            return "the model is called several times in each step" if capture.records else NOT_SEEN
        with torch.no_grad():
            capture.find_remaining_rows()
        return trace_spec_of(capture.records[0], capture.layers, self._model)

    def _compile(self, x: Tensor, y: Tensor, spec: SpecOrReason, first: _FirstEvaluation) -> None:
        functions = self._functions(first.trained, spec if isinstance(spec, TraceSpec) else NO_CAPTURE)
        # CUDA graphs are not used for refreshes, because a refresh returns new tensors.
        refresh = torch.compile(functions.refresh, mode=None if self._buffers else self._mode, **self._compile_options)
        reuse = torch.compile(functions.reuse, mode=self._mode, **self._compile_options)
        self._steps = CompiledSteps(_signature(x, y), first.output, spec, functions, reuse, refresh)
        logger.info("compiled for %s; refreshes: %s", self._steps.batch, self.why_plain or "compiled")
        if self._buffers:
            mark_static(self._state(self._steps))

    def _functions(self, trained: frozenset[str], spec: TraceSpec) -> StepFunctions:
        access, options, choices = self._access, self._access.options, self._access.choices()
        overrides = {choice.kernel_overrides for choice in choices.values()}
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        layers = [layer for layer in access.layers if all(p in names for p in layer.parameters.values())]
        captured = access.capture.layers
        sampled = options.fisher == "sampled" and isinstance(options.likelihood, Reparametrized)
        return StepFunctions(
            model=self._model,
            loss_fn=self._loss_fn,
            layers=layers,
            captured=captured,
            names={
                (layer.name, param_name): names[p] for layer in layers for param_name, p in layer.parameters.items()
            },
            trained=trained,
            likelihood=cast("Reparametrized", options.likelihood) if sampled else None,
            choices=choices,
            groups=[{name: group[name] for name in STATIC_SETTINGS} for group in access.groups],
            blocks={} if access.curvature is None else access.curvature.blocks,
            trust_region=options.trust_region,
            relative_damping=options.relative_damping,
            ops={key: access.ops_for(key) for key in {(), *overrides, *map(without_tf32x3, overrides)}},
            capture=FunctionalCapture(
                self._model, {name: captured[name].layer for name in spec.perturbations}, spec.samples_second
            ),
            spec=spec,
        )

    def _state(self, steps: CompiledSteps) -> StepState:
        parameters = dict(self._model.named_parameters())
        momenta = {name: self._access.momentum_of(parameters[name]) for name in steps.functions.trained}
        return StepState(parameters, dict(self._model.named_buffers()), momenta, *self._access.settings_and_rates())

    def _compiled_reuse(self, steps: CompiledSteps, x: Tensor, y: Tensor) -> Tensor:
        curvature = self._in_buffers(cast("Curvature", self._access.curvature))
        replays = self._buffers is not None
        with steps.functions.capture.attached(records=False), without_memory() if replays else nullcontext():
            loss = steps.reuse(self._state(steps), pack_curvature(curvature), x, y)
        self._access.advance(curvature, self._access.age)
        return loss.clone() if replays else loss  # the next replay overwrites what this one returned

    def _in_buffers(self, curvature: Curvature) -> Curvature:
        """Return the curvature in static buffers if CUDA graphs are replayed, or else the curvature itself."""
        if self._buffers is None or curvature is self._buffered:
            return curvature
        packed = self._buffers.update(pack_curvature(curvature))
        self._buffered = unpack_curvature(packed, self._access.layers, self._access.ops_for)
        return self._buffered

    def _compiled_refresh(self, steps: CompiledSteps, x: Tensor, y: Tensor) -> Tensor:
        access, functions, before = self._access, steps.functions, self._access.generator.get_state()
        noise = None if functions.likelihood is None else functions.likelihood.noise(steps.output, access.generator)
        access.release()
        numbers = access.dampings_and_failures(functions.blocks)
        try:
            with functions.capture.attached(records=True), ignore_vmap_warning():
                loss, packed = steps.refresh(self._state(steps), functions.spec.perturbations, *numbers, noise, x, y)
        except TorchDynamoException:
            access.generator.set_state(before)
            raise
        access.advance(self._in_buffers(unpack_curvature(packed, access.layers, access.ops_for)), 0)
        return loss


def _signature(x: Tensor, y: Tensor) -> Any:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in (x, y))
