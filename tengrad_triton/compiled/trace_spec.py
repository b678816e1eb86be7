"""The trace specification, made from one refresh of the plain step; or the reason why a refresh cannot be compiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.compiled.functional_capture import CallTensors
from tengrad_triton.curvature.choices import Choice
from tengrad_triton.kernels.spec import TF32X3
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
from tengrad_triton.likelihoods import Reparametrized, holds_a_batch
from tengrad_triton.optim.step_access import StepAccess
from tengrad_triton.tuning.precision import uses_tf32x3


@dataclass(frozen=True)
class TraceSpec:
    """What a compiled refresh takes over from one refresh of the plain step.

    Attributes:
        samples: N, the number of samples of the batch.
        perturbations: zeros for each layer and each of its calls, at the outputs whose output gradients are needed.
        samples_second: for each of these calls, whether the second dimension counts the samples.
        unattributed: the ids of unattributed parameters.
        from_model: the unattributed parameters whose rows come from running the whole model again, by their names in
            the model.
    """

    samples: int
    perturbations: CallTensors
    samples_second: Mapping[str, Sequence[bool]]
    unattributed: frozenset[int]
    from_model: Mapping[str, Tensor]


SpecOrReason = TraceSpec | str
"""The specification of a compiled refresh, or the reason why refreshes are not compiled."""
NOT_SEEN = "no refresh was seen yet"
NO_CAPTURE = TraceSpec(0, {}, {}, frozenset(), {})
"""The specification if refreshes are not compiled: nothing is captured."""


def why_not_compiled(access: StepAccess) -> str | None:
    """Return why the optimizer's settings need the plain step for a refresh, or None if they do not."""
    options = access.options
    several = options.fisher == "exact" or options.fisher_samples > 1
    if several or options.fisher_rows is not None or options.history > 1:
        return (
            "a compiled refresh has exactly one row for each sample: use fisher='sampled' or 'empirical' without "
            "fisher_samples, fisher_rows and history"
        )
    if options.fisher == "sampled" and not isinstance(options.likelihood, Reparametrized):
        return (
            f"{type(options.likelihood).__name__} is not a subclass of Reparametrized, but a compiled refresh draws "
            "labels by noise() and from_noise()"
        )
    of_one_batch = why_of_one_batch(options.likelihood) if options.fisher == "sampled" else None
    if of_one_batch is not None:
        return of_one_batch
    kept = None if access.curvature is None else access.curvature.spending
    if kept is not None and kept.rows < kept.of:
        return f"a compiled refresh has exactly one row for each sample, but {kept.why} leaves {kept.rows} of {kept.of}"
    if access.adapts:
        return "damping='lm' compares losses before and after the step, which a compiled refresh does not support"
    return _why_not_chosen(access.choices().values())


def why_of_one_batch(likelihood: Any) -> str | None:
    """Return that labels or weights of one batch are set, which may happen between any two steps; None if not."""
    if not holds_a_batch(likelihood):
        return None
    return (
        "the likelihood holds the labels of one batch, or weights, which would become constants of a compiled refresh"
    )


def _why_not_chosen(choices: Collection[Choice]) -> str | None:
    """Return why these choices need the plain step for a refresh, or None if they do not."""
    if any(choice.representation == "compressed" for choice in choices):
        return "the size of a compressed J depends on the data, but a compiled refresh has fixed sizes"
    if any(map(uses_tf32x3, choices)):
        return f"the plan's {TF32X3} kernels are allowed or not by the damping of each refresh"
    return None


def trace_spec_of(record: Record, layers: Mapping[str, CapturedLayer], model: nn.Module) -> SpecOrReason:
    """Return the specification of a refresh that captured ``record``, or why it cannot be compiled."""
    modules = list(model.modules())
    if record.by_backward:
        return "some rows take one backward pass for each sample, which is not compiled"
    if any(map(mixes_samples, modules)) and any(map(drops_out, modules)):
        return (
            "the model has batch norm and dropout: batch norm needs a second forward for the rows, in which "
            "dropout would drop other units"
        )
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
    return TraceSpec(record.samples, perturbations, samples_second, frozenset(record.unattributed), from_model)


def _perturbations(layer: nn.Module, call: LayerCall) -> dict[str, Tensor]:
    """Return zeros for a call's outputs, by their places; each is expanded from one number to save memory."""
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
