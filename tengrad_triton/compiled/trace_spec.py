"""Trace specification from one eager refresh: which derivatives a graph takes, or why there can be no graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.compiled.functional_capture import CallTensors
from tengrad_triton.layers import (
    Tap,
    arguments,
    drops_out,
    forward_with_taps,
    has_uncalled,
    mixes_samples,
    replay_rng,
    rule_reads_values,
)
from tengrad_triton.likelihoods import Reparametrized
from tengrad_triton.optim.step_access import StepAccess


@dataclass(frozen=True)
class TraceSpec:
    """What a graph of a refresh takes for granted.

    Attributes:
        perturbations: zeros for each layer and each of its calls, at the outputs whose derivatives are needed.
        samples_second: for each of these calls, whether the samples are the second dimension.
        unattributed: the ids of parameters whose rows are not those of their layers' calls.
        from_model: those of them whose rows come from running the whole model again, by their names in the model.
    """

    perturbations: CallTensors
    samples_second: Mapping[str, Sequence[bool]]
    unattributed: frozenset[int]
    from_model: Mapping[str, Tensor]


NO_CAPTURE = TraceSpec({}, {}, frozenset(), {})
"""The specification of a graph that reuses the curvature: it captures nothing."""


def why_not_compiled(access: StepAccess) -> str | None:
    """Return which setting only the plain step supports, if there is one."""
    options = access.options
    several = options.fisher == "exact" or options.fisher_samples > 1
    if several or options.fisher_rows is not None or options.history > 1:
        return "a graph has one row a sample: fisher='exact', fisher_samples, fisher_rows and history have others"
    if options.fisher == "sampled" and not isinstance(options.likelihood, Reparametrized):
        return "the likelihood is no Reparametrized: a graph needs its random numbers as an input"
    if options.fisher == "sampled" and getattr(options.likelihood, "target", None) is not None:
        return "the likelihood has a batch's target, which a graph would keep"
    if access.adapts:
        return "damping='lm' compares losses"
    if any(choice.representation == "compressed" for choice in access.choices().values()):
        return "the rank of a compressed J depends on the data"
    return None


def trace_spec_of(record: Record, layers: Mapping[str, CapturedLayer], model: nn.Module) -> TraceSpec | str:
    """Return the specification of a refresh that captured ``record``, or why no graph can compute it."""
    modules = list(model.modules())
    if record.used_backward_per_sample:
        return "some rows take one backward pass for each sample"
    if any(map(mixes_samples, modules)) and any(map(drops_out, modules)):
        return "where samples mix, rows take a second forward, and dropout would drop other units in it"
    perturbations, samples_second = {}, {}
    for name, calls in record.calls.items():
        layer = layers[name]
        if all(not p.requires_grad or id(p) in record.unattributed for p in layer.parameters.values()):
            continue
        if any(rule_reads_values(layer.layer, call.call) for call in calls):
            return f"the rule for {type(layer.layer).__name__} depends on the numbers in its arguments"
        perturbations[name] = [_perturbations(layer.layer, call) for call in calls]
        samples_second[name] = [call.samples_second for call in calls]
    found = record.unattributed.keys() & record.per_sample_grads.keys()
    from_model = {name: p for name, p in model.named_parameters() if id(p) in found}
    return TraceSpec(perturbations, samples_second, frozenset(record.unattributed), from_model)


def _perturbations(layer: nn.Module, call: LayerCall) -> dict[str, Tensor]:
    """Return zeros, expanded from one number, by the places where a graph adds them to a call's outputs."""
    if not call.has_grads:
        return {}
    if not has_uncalled(layer):
        return {str(k): _expanded_zero(grad) for k, grad in enumerate(call.output_grads) if grad is not None}
    tap, weights = Tap(), dict(layer.named_parameters(remove_duplicate=False))
    with torch.no_grad(), replay_rng(call.call.rng, next(layer.parameters()).device):
        forward_with_taps(layer, weights, arguments(layer, call.call), tap)
    return {name: _expanded_zero(ys[0]).expand(len(ys), *ys[0].shape) for name, ys in tap.outputs.items()}


def _expanded_zero(like: Any) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
