"""The training step as one compiled function: forward, capture, backward, refresh or reuse, update.

Two graphs, chosen in Python: one reuses the curvature, one refreshes it. Both are the plain loop's mathematics over the
same parts (canonical form, Jacobian, Woodbury, update rule), with `torch.func.vjp` in place of autograd's tape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from tengrad_triton.capture.rerun import ignore_vmap_warning
from tengrad_triton.compiled.functional_capture import FunctionalCapture
from tengrad_triton.compiled.graphs import GROUP_WORDS, Graphs, LossFn, State
from tengrad_triton.compiled.static_buffers import StaticBuffers, mark_static
from tengrad_triton.compiled.trace_spec import NOTHING, TraceSpec, trace_spec_of, why_not_compiled
from tengrad_triton.curvature.checkpoint import pack_curvature, unpack_curvature
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.likelihoods import Reparametrized
from tengrad_triton.optim.tengrad import TENGraD

_REPLAYED = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that capture CUDA graphs."""


def compile_train_step(
    model: nn.Module, loss_fn: LossFn, optimizer: TENGraD, *, mode: str | None = None, backend: str = "inductor"
) -> TrainStep:
    """Return ``train_step(x, y) -> loss``: what the plain loop does for one batch, as one compiled graph.

    The first step is one of the plain loop, from which the graphs learn the shapes; the graph that reuses the curvature
    is compiled at the next step, the one that refreshes it at the next refresh. Model, optimizer and ``state_dict``
    mark_static ordinary: plain and compiled steps can follow each other in any order. A batch of another size takes the plain
    step, and so does a refresh that no graph can have; ``train_step.why_plain`` says why.

    Args:
        model: takes ``x``; the optimizer's own model.
        loss_fn: takes the model's output and ``y``; returns a scalar mean over the samples.
        optimizer: of that model.
        mode: of `torch.compile`; ``"reduce-overhead"`` replays CUDA graphs, for which J stays where it is and is copied
            there by each refresh.
        backend: of `torch.compile`.

    Raises:
        ValueError: the optimizer belongs to another model.
        TypeError: it is no `TENGraD`.
    """
    if not isinstance(optimizer, TENGraD):
        raise TypeError(
            f"optimizer must be a TENGraD, got {type(optimizer).__name__}: compile the model by torch.compile, and a "
            "rival's step by its compile_step()"
        )
    if optimizer.model is not model:
        raise ValueError("the optimizer belongs to another model: pass the one that it was made with")
    return TrainStep(optimizer._module, loss_fn, optimizer, mode, backend)


@dataclass(frozen=True)
class CompiledSteps:
    """What a step of the plain loop taught, and the graphs that take it for granted.

    Attributes:
        batch: the shapes and dtypes of x and y.
        output: a tensor like the model's output, to draw noise for.
        lesson: what a graph of the refresh needs to know; or why it cannot be had, empty until one was seen.
        graphs: made for these.
        reuse: the compiled graph of that name.
        refresh: the compiled graph of that name.
    """

    batch: Any
    output: Tensor
    lesson: TraceSpec | str
    graphs: Graphs
    reuse: Callable[..., Any]
    refresh: Callable[..., Any]


class TrainStep:
    """Made by `compile_train_step`; call it with a batch."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, optimizer: TENGraD, mode: str | None, backend: str) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._mode = mode
        self._place = StaticBuffers() if mode in _REPLAYED else None
        self._placed: Curvature | None = None  # the curvature whose tensors are there
        self._learned: CompiledSteps | None = None
        self._warned = False
        self._untraceable: str | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step with a batch; return its loss, from before the step.

        Raises:
            ValueError: ``loss_fn`` returned no scalar, or no mean over the samples.
            RuntimeError: the model or the loss cannot be traced in one graph.
        """
        due, learned, now = self._optimizer._refresh_is_due(), self._learned, self._optimizer._curvature
        if learned is None or not self._fits(learned, x, y):
            return self._plain(x, y)
        refreshes = due and self.why_plain is None
        reuses = not due and now is not None and self._is_of(now, len(x))
        if not refreshes and not reuses:
            return self._plain(x, y)
        self._optimizer.close()  # the graphs capture by themselves
        try:
            with torch.no_grad():
                return self._compiled_refresh(learned, x, y) if due else self._compiled_reuse(learned, x, y)
        except TorchDynamoException as error:
            self._optimizer._rearm()
            if due:
                return self._plain_from_now_on(error, x, y)
            raise RuntimeError(
                f"the step cannot be traced in one graph: {error}\nThe plain loop (zero_grad, forward, backward, "
                "optimizer.step()) does the same without compilation"
            ) from error

    @property
    def why_plain(self) -> str | None:
        """Return why refreshes take the plain step; None where they are compiled."""
        if self._untraceable is not None or self._learned is None:
            return self._untraceable or "no step was take_rows yet"
        lesson = self._learned.lesson
        return (lesson or "no refresh was seen yet") if isinstance(lesson, str) else None

    def _plain_from_now_on(self, error: Exception, x: Tensor, y: Tensor) -> Tensor:
        self._untraceable = f"it cannot be traced in one graph: {error}"
        first_line = self._untraceable.splitlines()[0]
        warnings.warn(f"refreshes take the plain step ({first_line}): why_plain says more", stacklevel=3)
        return self._plain(x, y)

    def _is_of(self, curvature: Curvature, samples: int) -> bool:
        """Whether the curvature is one that batches of this size leave: another one would be compiled for anew."""
        return curvature.rows % samples == 0 or curvature.rows == self._optimizer._options.fisher_rows

    def _fits(self, learned: CompiledSteps, x: Tensor, y: Tensor) -> bool:
        """Whether the graphs are for batches like this one; says once if not."""
        came = _signature(x, y)
        if came != learned.batch and not self._warned:
            self._warned = True
            warnings.warn(f"compiled for {learned.batch}: a batch of {came} takes the plain step", stacklevel=3)
        return came == learned.batch

    # The plain step, from which the graphs learn

    def _plain(self, x: Tensor, y: Tensor) -> Tensor:
        optimizer, before = self._optimizer, self._learned
        learns = before is None or (isinstance(before.lesson, str) and before.batch == _signature(x, y))
        first: dict[str, Any] = {}

        def closure() -> Tensor:
            optimizer.zero_grad()
            output = self._model(x)
            loss = self._loss_fn(output, y)
            if before is None and not first:
                _check_loss(self._loss_fn, output, y, loss)
            loss.backward()
            if not first:
                first["output"], first["lesson"] = output.detach(), self._lesson() if learns else ""
                first["trained"] = frozenset(n for n, p in self._model.named_parameters() if p.grad is not None)
            return loss.detach()

        loss = cast("Tensor", optimizer.step(closure))
        optimizer.zero_grad()
        lesson = why_not_compiled(optimizer) or first["lesson"]
        if before is None or (learns and isinstance(lesson, TraceSpec)):
            self._learn(x, y, lesson, first)
        elif learns and lesson:
            self._learned = replace(before, lesson=lesson)
        return loss

    def _lesson(self) -> TraceSpec | str:
        """Return what the forward and backward that were just recorded teach; no word where none were."""
        capture = self._optimizer._capture
        if len(capture.records) != 1:
            return "the model is called several times a step" if capture.records else ""
        with torch.no_grad():
            capture.complete()
        return trace_spec_of(capture.records[0], capture.layers, self._model)

    def _learn(self, x: Tensor, y: Tensor, lesson: TraceSpec | str, first: dict[str, Any]) -> None:
        graphs = self._graphs(first["trained"], lesson if isinstance(lesson, TraceSpec) else NOTHING)
        # A refresh leaves new tensors behind: nothing to capture and replay.
        refresh = torch.compile(graphs.refresh, mode=None if self._place else self._mode, **self._options)
        reuse = torch.compile(graphs.reuse, mode=self._mode, **self._options)
        self._learned = CompiledSteps(_signature(x, y), first["output"], lesson, graphs, reuse, refresh)
        if self._place:
            mark_static(self._state(self._learned))

    def _graphs(self, trained: frozenset[str], lesson: TraceSpec) -> Graphs:
        optimizer = self._optimizer
        full = {parameter: name for name, parameter in self._model.named_parameters()}
        blocks = [block for block in optimizer._blocks if all(p in full for p in block.parameters.values())]
        choices = optimizer.choices()
        o = optimizer._options
        sampled = o.fisher == "sampled" and isinstance(o.likelihood, Reparametrized)
        return Graphs(
            model=self._model,
            loss_fn=self._loss_fn,
            blocks=blocks,
            sources=optimizer._capture.layers,
            names={(block.name, label): full[p] for block in blocks for label, p in block.parameters.items()},
            trained=trained,
            likelihood=cast("Reparametrized", o.likelihood) if sampled else None,
            chosen=choices,
            groups=[{name: group[name] for name in GROUP_WORDS} for group in optimizer.param_groups],
            systems={} if optimizer._curvature is None else optimizer._curvature.systems,
            trust_region=o.trust_region,
            relative=o.relative_damping,
            kernels={t: optimizer._ops_for(t) for t in {(), *(c.kernel_overrides for c in choices.values())}},
            tape=FunctionalCapture(
                self._model,
                {name: optimizer._capture.layers[name].layer for name in lesson.zeros},
                lesson.swapped,
            ),
            lesson=lesson,
        )

    # The compiled steps

    def _state(self, learned: CompiledSteps) -> State:
        parameters = dict(self._model.named_parameters())
        momenta = {name: self._optimizer._momentum_of(parameters[name]) for name in learned.graphs.trained}
        settings = self._optimizer._settings_now()
        return State(parameters, dict(self._model.named_buffers()), momenta, settings)

    def _compiled_reuse(self, learned: CompiledSteps, x: Tensor, y: Tensor) -> Tensor:
        optimizer, now = self._optimizer, self._resident(cast("Curvature", self._optimizer._curvature))
        with learned.graphs.tape.standing(noting=False):
            loss = learned.reuse(self._state(learned), pack_curvature(now), x, y)
        optimizer._advance(now, optimizer._age)
        return loss

    def _resident(self, curvature: Curvature) -> Curvature:
        """Return the curvature in tensors that do not move, where the graph is replayed."""
        if self._place is None or curvature is self._placed:
            return curvature
        packed = self._place.take(pack_curvature(curvature))
        self._placed = unpack_curvature(packed, self._optimizer._blocks, self._optimizer._ops_for)
        return self._placed

    def _compiled_refresh(self, learned: CompiledSteps, x: Tensor, y: Tensor) -> Tensor:
        optimizer, graphs, before = self._optimizer, learned.graphs, self._optimizer._generator.get_state()
        noise = None if graphs.likelihood is None else graphs.likelihood.noise(learned.output, optimizer._generator)
        optimizer._release()
        dampings = optimizer._damping_of(graphs.systems)
        try:
            with graphs.tape.standing(noting=True), ignore_vmap_warning():
                loss, packed = learned.refresh(self._state(learned), graphs.lesson.zeros, *dampings, noise, x, y)
        except TorchDynamoException:
            optimizer._generator.set_state(before)
            raise
        optimizer._advance(self._resident(unpack_curvature(packed, optimizer._blocks, optimizer._ops_for)), 0)
        return loss


def _signature(x: Tensor, y: Tensor) -> Any:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in (x, y))


def _check_loss(loss_fn: LossFn, output: Tensor, y: Tensor, loss: Tensor) -> None:
    """Reject a loss that is no scalar, or that a doubled batch changes."""
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar mean over the samples, got shape {tuple(loss.shape)}")
    with torch.no_grad():
        doubled = loss_fn(torch.cat([output, output]), torch.cat([y, y]))
    if not torch.isclose(doubled, loss, rtol=1e-2):
        raise ValueError(
            f"loss_fn must return a mean over the samples: it gave {loss.item():.4g} for a batch and "
            f"{doubled.item():.4g} for the same batch twice"
        )
