"""The training step as one compiled function: forward, capture, backward, refresh or reuse, update.

There are two compiled functions: one reuses the curvature, the other one refreshes it. Python chooses between them.
Both compute the same as the plain step with the same parts (contributions, Jacobians, Woodbury, update), but they use
`torch.func.vjp` instead of hooks and autograd's graph.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import list_mode_options

from tengrad_triton.capture.rows.rerun import ignore_vmap_warning
from tengrad_triton.compiled.graphs import LossFn, StepState
from tengrad_triton.compiled.prepare import CompiledSteps, FirstEvaluation, IsTracedAnew, prepare
from tengrad_triton.compiled.sample_space import ProjectedMeans
from tengrad_triton.compiled.signatures import MOST, ModelState, Prepared, Signature, batch_signature
from tengrad_triton.compiled.static_buffers import StaticBuffers, mark_static
from tengrad_triton.compiled.trace_spec import NOT_SEEN, SpecOrReason, TraceSpec, trace_spec_of, why_not_compiled
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.distributed.ranks import unwrapped
from tengrad_triton.kernels import without_memory
from tengrad_triton.optim.step_access import StepAccess
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.optim.validation import check_choice, check_loss

logger = logging.getLogger(__name__)
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that capture CUDA graphs."""


def compile_train_step(
    model: nn.Module, loss_fn: LossFn, optimizer: TENGraD, *, mode: str | None = None, backend: str = "inductor"
) -> TrainStep:
    """Return ``train_step(x, y) -> loss``, which does what the plain loop does for one batch, as one compiled function.

    The first step with a kind of batch is a plain step, which shows the sizes of all tensors. When that kind of batch
    comes again, the functions for it are compiled: one that reuses the curvature, and one, at the next refresh, that
    refreshes it. Kinds of batches differ in structure, shapes, dtypes, and in the values of what is no tensor. Once a
    kind has been compiled for, another one is too if it comes twice in a row, up to four kinds. All other batches, such
    as a smaller one at the end of each epoch, take the plain step; so does a refresh that cannot be compiled, and every
    step with several processes, or while a parameter has a hook on its gradient; ``train_step.why_plain`` says why. It
    is the same where the model changes: its mode, what of it is frozen, the optimizer's groups.

    Model, optimizer and ``state_dict`` stay ordinary: plain and compiled steps can follow each other in any order. The
    optimizer's step hooks run once in each step, as in ``optimizer.step(closure)``: before the forward and after the
    update. They see no ``.grad``. Learning rate schedulers count every step.

    Args:
        model: the optimizer's model, which takes ``x`` as its only argument and returns a tensor, samples first. A
            dictionary is not spread over keyword arguments: wrap a model that needs this in a module whose ``forward``
            calls it by ``model(**x)``, and make the optimizer for that module.
        loss_fn: takes the model's output and ``y``; returns a scalar mean over the samples.
        optimizer: the optimizer of that model.
        mode: the mode of `torch.compile`. With ``"reduce-overhead"``, which replays CUDA graphs, J keeps its address:
            each refresh copies the new J into the old tensors.
        backend: the backend of `torch.compile`.

    Raises:
        ValueError: the optimizer belongs to another model, or ``mode`` is unknown to torch's inductor.
        TypeError: the optimizer is not a `TENGraD`.
    """
    if not isinstance(optimizer, TENGraD):
        raise TypeError(
            f"optimizer must be a TENGraD, got {type(optimizer).__name__}: compile the model by torch.compile, and the "
            "step of a baseline by its compile_step()"
        )
    if optimizer.model is not unwrapped(model):
        raise ValueError("the optimizer belongs to another model: pass the one that it was made with")
    if mode is not None and backend == "inductor":
        check_choice("mode", mode, list(list_mode_options()))
    return TrainStep(model, loss_fn, StepAccess(optimizer), mode, backend)


class TrainStep:
    """A training step, made by `compile_train_step`; call it with a batch. `why_plain` says what is not compiled."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, access: StepAccess, mode: str | None, backend: str) -> None:
        self._called = model if access.trains_together else access.module  # by plain steps
        self._model, self._loss_fn, self._access = access.module, loss_fn, access
        self._compile_options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._mode = mode
        self._buffers = StaticBuffers() if mode in _CUDA_GRAPH_MODES else None
        self._buffered: Curvature | None = None  # the curvature whose tensors are in the buffers
        self._model_state, self._prepared = ModelState(access), Prepared[CompiledSteps]()
        self._means = ProjectedMeans(are_static=self._buffers is not None)
        self._warned = self._warned_of_hooks = self._loss_is_checked = False
        self._hooked: str | None = None  # why the last step was plain, if a parameter has a hook
        self._untraceable: str | None = None  # why the refresh could not be traced

    def __call__(self, x: Any, y: Any) -> Tensor:
        """Take one step with a batch.

        Args:
            x: the model's input: a tensor, samples first, or tensors in nested tuples, lists and dictionaries. Other
                entries (numbers, strings, None) are constants of what is compiled.
            y: the target of ``loss_fn``, nested in the same way.

        Returns:
            the loss of the batch before the step, a scalar without a graph.

        Raises:
            ValueError: ``loss_fn`` returned no scalar, or no mean over the samples.
            TypeError: the batch holds something else, or the model returned no tensor.
            RuntimeError: the model or the loss cannot be traced in one graph.
        """
        signature = Signature(batch_signature(x, y), self._model_state.read())
        steps = self._prepared.find(signature, self._access.layers)
        if steps is None:
            self._warn_of_another(signature)
        was_traceable, self._hooked = self._untraceable is None, self._model_state.why_hooked()
        if self._hooked is not None and not self._warned_of_hooks:
            self._warned_of_hooks = True
            warnings.warn(f"{self._hooked}: such steps are plain", stacklevel=2)
        loss = self._access.step(lambda: self._take(signature, steps, x, y))
        if self._untraceable is not None and was_traceable:
            first_line = self._untraceable.splitlines()[0]
            warnings.warn(f"refreshes take the plain step ({first_line}); see train_step.why_plain", stacklevel=2)
        return loss

    @property
    def why_plain(self) -> str | None:
        """Return why refreshes take the plain step; None if they are compiled."""
        latest = self._prepared.latest
        why = self._untraceable or self._hooked
        if why is not None or latest is None:
            return why or "no step was taken yet"
        return latest[1].why_plain

    def _take(self, signature: Signature, steps: CompiledSteps | None, x: Any, y: Any) -> Tensor:
        """Take the step that fits, within the optimizer's step hooks."""
        due, curvature = self._access.refresh_is_due, self._access.curvature
        if steps is None or self._hooked is not None:
            return self._plain(signature, steps, x, y)
        refreshes = due and self._untraceable is None and steps.why_plain is None
        reuses = not due and curvature is not None and self._is_from_batches_of(len(steps.output), curvature)
        if not refreshes and not reuses:
            return self._plain(signature, steps, x, y)
        self._access.detach_hooks()
        try:
            with torch.no_grad():
                return self._compiled_refresh(steps, x, y) if due else self._compiled_reuse(steps, x, y)
        except TorchDynamoException as error:
            self._access.attach_hooks_if_due()
            if due:
                self._untraceable = f"the refresh cannot be traced in one graph: {error}"
                return self._plain(signature, steps, x, y)
            raise RuntimeError(
                f"the step cannot be traced in one graph: {error}\nThe plain loop (zero_grad, forward, backward, "
                "optimizer.step()) does the same without compilation"
            ) from error

    def _is_from_batches_of(self, samples: int, curvature: Curvature) -> bool:
        """Whether the number of rows fits batches of this size. Any other number would trigger a recompilation."""
        return curvature.rows % samples == 0 or curvature.rows == self._access.options.fisher_rows

    def _warn_of_another(self, signature: Signature) -> None:
        """Warn, once, that there are compiled functions, but not for this signature."""
        latest = self._prepared.latest
        if self._warned or latest is None or not self._prepared.keeps_any:
            return
        self._warned = True
        if latest[0].batch != signature.batch:
            what = f"compiled for {latest[0]}: a batch of {signature}"
        else:
            what = (
                "the model's mode, its frozen parameters or a group's settings have changed since it was compiled: it"
            )
        until = f"until such a step comes twice in a row (at most {MOST} kinds are compiled)"
        warnings.warn(f"{what} takes the plain step, {until}", stacklevel=3)

    # The plain step, from which the compiled functions are made

    def _plain(self, signature: Signature, steps: CompiledSteps | None, x: Any, y: Any) -> Tensor:
        first: FirstEvaluation | None = None
        wants_spec = self._prepared.takes_more if steps is None else steps.why_plain is not None

        def closure() -> Tensor:
            nonlocal first
            self._access.zero_grad()
            output = self._called(x)
            _require_tensor(output)
            loss = self._loss_fn(output, y)
            if not self._loss_is_checked:
                check_loss(self._loss_fn, output, y, loss)
                self._loss_is_checked = True
            loss.backward()
            if first is None:
                spec = self._trace_spec() if wants_spec else NOT_SEEN
                trained = frozenset(name for name, p in self._model.named_parameters() if p.grad is not None)
                first = FirstEvaluation(output.detach(), spec, trained)
            return loss.detach()

        loss = self._access.plain_step(closure)
        self._access.zero_grad()
        seen = cast("FirstEvaluation", first)
        spec = why_not_compiled(self._access) or seen.spec
        if wants_spec and (steps is None or isinstance(spec, TraceSpec)):
            self._prepare(signature, spec, seen)
        elif wants_spec and steps is not None and spec != NOT_SEEN:
            self._prepared.put(signature, replace(steps, spec=spec))
        return loss

    def _trace_spec(self) -> SpecOrReason:
        """Return the specification of the forward and backward that were just captured, or why there is none."""
        capture = self._access.capture
        if len(capture.records) != 1:
            return "the model is called several times in each step" if capture.records else NOT_SEEN
        return trace_spec_of(capture.records[0], capture.layers, self._model)

    def _prepare(self, signature: Signature, spec: SpecOrReason, first: FirstEvaluation) -> None:
        # CUDA graphs are not used for refreshes, because a refresh returns new tensors.
        modes = (None if self._buffers else self._mode, self._mode)
        steps = prepare(self._access, self._loss_fn, spec, first, modes, self._compile_options)
        self._prepared.put(signature, steps)
        logger.info("prepared for %s; refreshes: %s", signature, self._untraceable or steps.why_plain or "compiled")
        if self._buffers:
            mark_static(self._state(steps))

    def _state(self, steps: CompiledSteps) -> StepState:
        parameters = dict(self._model.named_parameters())
        functions = steps.functions
        own = functions.trained.intersection(functions.names.values())  # the model's others are not the optimizer's
        momenta = {name: self._access.momentum_of(parameters[name]) for name in own}
        numbers = self._access.numbers_of_groups()
        copies = self._access.copies_of({name: parameters[name] for name in own})
        return StepState(parameters, dict(self._model.named_buffers()), momenta, *numbers, copies)

    def _compiled_reuse(self, steps: CompiledSteps, x: Any, y: Any) -> Tensor:
        access, functions, replays = self._access, steps.functions, self._buffers is not None
        curvature, state = self._in_buffers(cast("Curvature", access.curvature)), self._state(steps)
        dense = functions.dense_layers(curvature, steps.reuse.linear(state, x, y))
        momenta = functions.averages_of(curvature, dense, state.momenta)
        means = self._means.of(curvature, momenta, access.steps)
        try:
            with functions.capture.attached(dense, detaches=False), without_memory() if replays else nullcontext():
                loss = steps.reuse(state, _packed(curvature), dense, means, x, y)
        except IsTracedAnew:
            return self._compiled_reuse(steps, x, y)
        access.advance(curvature, access.age)
        self._means.keep(curvature, momenta, access.steps)
        return loss.clone() if replays else loss  # the next replay overwrites what this one returned

    def _in_buffers(self, curvature: Curvature) -> Curvature:
        """Return the curvature in static buffers if CUDA graphs are replayed, or else the curvature itself."""
        if self._buffers is None or curvature is self._buffered:
            return curvature
        packed = self._buffers.update(_packed(curvature))
        buffered = unpack_curvature(packed, self._access.layers, self._access.ops_for)
        self._buffered = replace(buffered, spending=curvature.spending)
        self._buffered.projected.update(curvature.projected)
        return self._buffered

    def _compiled_refresh(self, steps: CompiledSteps, x: Any, y: Any) -> Tensor:
        access, functions, before = self._access, steps.functions, self._access.generator.get_state()
        noise = None if functions.likelihood is None else functions.likelihood.noise(steps.output, access.generator)
        access.release()
        state = self._state(steps)
        linear = steps.refresh.linear(state, x, y)
        inputs = functions.spec.perturbations, *access.before_refresh(functions.blocks), linear, noise
        try:
            with functions.capture.attached(functions.spec.perturbations, detaches=True), ignore_vmap_warning():
                loss, packed, means = steps.refresh(state, *inputs, x, y)
        except IsTracedAnew:
            access.generator.set_state(before)
            return self._compiled_refresh(steps, x, y)
        except Exception:
            access.generator.set_state(before)
            raise
        curvature = unpack_curvature(packed, access.layers, access.ops_for)
        spending = None if access.curvature is None else access.curvature.spending
        curvature = self._in_buffers(replace(curvature, spending=spending))
        access.advance(curvature, 0)
        dense = functions.dense_layers(curvature, linear)
        self._means.keep(curvature, functions.averages_of(curvature, dense, state.momenta), access.steps, means)
        return loss


def _packed(curvature: Curvature) -> dict[str, Any]:
    """Return the curvature packed, without what a compiled step does not depend on."""
    return pack_curvature(replace(curvature, spending=None))


def _require_tensor(output: Any) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}, but a compiled step needs one tensor: return only the "
            "output that the loss takes, or use the plain loop"
        )
