"""Prepare the compiled functions of one signature from a plain step; `torch.compile` compiles at their first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad

from tengrad_triton.capture.rows.unobserved import unobserved
from tengrad_triton.compiled.functional_capture import FunctionalCapture
from tengrad_triton.compiled.graphs import STATIC_SETTINGS, LossFn, StepFunctions, StepState
from tengrad_triton.compiled.sample_space import linear_layers, sums_to, weight_grads_of
from tengrad_triton.compiled.trace_spec import NO_CAPTURE, SpecOrReason, TraceSpec, why_of_one_batch
from tengrad_triton.layers.stateless import places_of
from tengrad_triton.likelihoods import Reparametrized
from tengrad_triton.optim.step_access import StepAccess
from tengrad_triton.tuning.precision import without_tf32x3


class IsTracedAnew(Exception):  # noqa: N818 - no error: the caller calls again
    """The compiled function does not fit any more, because the model or the curvature has changed."""


class Traced:
    """A compiled function of a step. Before it is traced, linear layers are found to have no other use of weights.

    Args:
        functions: the functions before their compilation.
        compiled: `StepFunctions.reuse` or `refresh`, compiled.
    """

    def __init__(self, functions: StepFunctions, compiled: Callable[..., Any]) -> None:
        self._functions, self._compiled = functions, compiled
        self._fits, self._is_exact = False, bool(functions.linear)

    def linear(self, state: StepState, x: Any, y: Any) -> Sequence[str]:
        """Return the layers that the next call may project in sample space (M19)."""
        if self._is_exact and not self._fits:  # it will be traced: the model may have changed since it was prepared
            self._is_exact = self._calls_give_gradients(state, x, y)
        return self._functions.linear if self._is_exact else ()

    def _calls_give_gradients(self, state: StepState, x: Any, y: Any) -> bool:
        """Return whether the gradients of linear layers' weights are those of their calls: a pass without a step."""
        one = self._functions
        perturbations = {name: one.spec.perturbations[name] for name in one.linear}
        devices = {p.device for p in state.parameters.values() if p.is_cuda}
        attached = one.capture.attached(perturbations, detaches=True)
        with torch.random.fork_rng(devices), unobserved(one.model), attached:
            try:
                output, pull, tensors = one.forward(state, perturbations, x, detach_statistics=True)
                grads, by_perturbation = pull(grad(one.loss_fn)(output, y))
                calls = weight_grads_of(one.capture, perturbations, tensors, by_perturbation)
            except Exception:
                return False
        names = {name: one.names[name, "weight"] for name in perturbations}
        return all(own in grads and sums_to(calls[name], grads[own]) for name, own in names.items())

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; raise `IsTracedAnew` instead where it projects in sample space and does not fit."""
        if not self._is_exact or not self._fits:
            found = self._compiled(*arguments)
            self._fits = True
            return found
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._compiled(*arguments)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
        self._fits = False
        raise IsTracedAnew


@dataclass(frozen=True)
class CompiledSteps:
    """The compiled functions, and the specification that they were made for.

    Attributes:
        output: a tensor like the model's output, to draw noise for.
        spec: the specification of the refresh, or why refreshes are not compiled.
        functions: the functions before their compilation.
        reuse: the compiled `StepFunctions.reuse`.
        refresh: the compiled `StepFunctions.refresh`.
    """

    output: Tensor
    spec: SpecOrReason
    functions: StepFunctions
    reuse: Traced
    refresh: Traced

    @property
    def why_plain(self) -> str | None:
        """Return why refreshes are not compiled at present; None if they are."""
        return self.spec if isinstance(self.spec, str) else why_of_one_batch(self.functions.likelihood)


@dataclass
class FirstEvaluation:
    """The first evaluation of a plain step's closure; ``trained`` names the parameters with a gradient."""

    output: Tensor
    spec: SpecOrReason
    trained: frozenset[str]


def prepare(
    access: StepAccess,
    loss_fn: LossFn,
    spec: SpecOrReason,
    first: FirstEvaluation,
    modes: tuple[str | None, str | None],
    options: Mapping[str, Any],
) -> CompiledSteps:
    """Return the functions for batches like that of a plain step.

    Args:
        access: to the optimizer.
        loss_fn: the training loop's loss.
        spec: the specification of the refresh, or why refreshes are not compiled.
        first: the first evaluation in the plain step.
        modes: the modes of `torch.compile` for the refresh and the reuse.
        options: further options of `torch.compile`.
    """
    # A step that reuses the curvature captures dense layers, also where refreshes are not compiled.
    captures = spec if isinstance(spec, TraceSpec) else first.spec
    functions = _functions(access, loss_fn, first.trained, captures if isinstance(captures, TraceSpec) else NO_CAPTURE)
    refresh = torch.compile(_with_own_code(functions.refresh), mode=modes[0], **options)
    reuse = torch.compile(_with_own_code(functions.reuse), mode=modes[1], **options)
    return CompiledSteps(first.output, spec, functions, Traced(functions, reuse), Traced(functions, refresh))


def _with_own_code(method: Any) -> Callable[..., Any]:
    """Return the method with a copy of its code: Dynamo counts its recompilations, and ends at 8, for each code."""
    function = method.__func__
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return MethodType(own, method.__self__)


def _functions(access: StepAccess, loss_fn: LossFn, trained: frozenset[str], spec: TraceSpec) -> StepFunctions:
    model, options, choices = access.module, access.options, access.choices()
    overrides = {choice.kernel_overrides for choice in choices.values()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = [layer for layer in access.layers if all(p in names for p in layer.parameters.values())]
    captured = access.capture.layers
    groups = [{name: group[name] for name in STATIC_SETTINGS} for group in access.groups]
    sampled = options.fisher == "sampled" and isinstance(options.likelihood, Reparametrized)
    return StepFunctions(
        model=model,
        places=places_of(model),
        loss_fn=loss_fn,
        layers=layers,
        captured=captured,
        names={(layer.name, param_name): names[p] for layer in layers for param_name, p in layer.parameters.items()},
        trained=trained,
        likelihood=cast("Reparametrized", options.likelihood) if sampled else None,
        choices=choices,
        groups=groups,
        blocks={} if access.curvature is None else access.curvature.blocks,
        trust_region=options.trust_region,
        clip_threshold=options.clip_threshold,
        relative_damping=options.relative_damping,
        scaling=options.scaling,
        ops={key: access.ops_for(key) for key in {(), *overrides, *map(without_tf32x3, overrides)}},
        capture=FunctionalCapture(
            model, {name: captured[name].layer for name in spec.perturbations}, spec.samples_second
        ),
        spec=spec,
        linear=linear_layers(layers, captured, groups, spec.perturbations),
    )
