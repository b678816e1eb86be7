"""What a refresh of the plain loop teaches a graph: which derivatives to take, or why it cannot be compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.compiled.functional_capture import Calls
from tengrad_triton.layers import (
    Tap,
    arguments,
    drops_out,
    forward_with_taps,
    has_uncalled,
    rule_reads_values,
    mixes_samples,
    replay_rng,
)
from tengrad_triton.likelihoods import Reparametrized
from tengrad_triton.optim.tengrad import TENGraD


@dataclass(frozen=True)
class TraceSpec:
    """What a graph takes for granted of a refresh.

    Attributes:
        zeros: for each layer, for each of its calls, what is added where a derivative is to be take_rows.
        swapped: for each of these calls, whether the samples are the second dimension.
        unattributed: the ids of parameters whose rows are not those of their layers' calls.
        by_model: of these, by their names in the model, the ones whose rows come from the whole model run again.
    """

    zeros: Calls
    swapped: Mapping[str, Sequence[bool]]
    unattributed: frozenset[int]
    by_model: Mapping[str, Tensor]


NOTHING = TraceSpec({}, {}, frozenset(), {})
"""Enough for a graph that takes no derivative by outputs."""


def why_not_compiled(optimizer: TENGraD) -> str | None:
    """Return which setting is the plain step's alone, if one is."""
    o = optimizer._options
    if o.fisher == "exact" or o.fisher_samples > 1 or o.fisher_rows is not None or o.history > 1:
        return "a graph has one row a sample: fisher='exact', fisher_samples, fisher_rows and history take others"
    if o.fisher == "sampled" and not isinstance(o.likelihood, Reparametrized):
        return "the likelihood is no Reparametrized: a graph needs its random numbers from outside"
    if o.fisher == "sampled" and getattr(o.likelihood, "target", None) is not None:
        return "the likelihood has a batch's target, which a graph would keep"
    if optimizer.adapts:
        return "damping='lm' compares losses"
    if any(choice.representation == "compressed" for choice in optimizer.choices().values()):
        return "the rank of a compressed J depends on the data"
    return None


def trace_spec_of(record: Record, sources: Mapping[str, CapturedLayer], model: nn.Module) -> TraceSpec | str:
    """Return what a refresh that left ``record`` teaches, or why no graph can do the same."""
    modules = list(model.modules())
    if record.used_backward_per_sample:
        return "some rows take a backward pass a sample"
    if any(map(mixes_samples, modules)) and any(map(drops_out, modules)):
        return "rows take a forward of their own where samples mix, which would drop out other units"
    zeros, swapped = {}, {}
    for name, uses in record.calls.items():
        source = sources[name]
        if all(not p.requires_grad or id(p) in record.unattributed for p in source.parameters.values()):
            continue
        if any(rule_reads_values(source.layer, use.call) for use in uses):
            return f"the rule for {type(source.layer).__name__} depends on numbers in what it is called with"
        zeros[name] = [_zeros(source.layer, use) for use in uses]
        swapped[name] = [use.samples_second for use in uses]
    found = record.unattributed.keys() & record.per_sample_grads.keys()
    by_model = {name: p for name, p in model.named_parameters() if id(p) in found}
    return TraceSpec(zeros, swapped, frozenset(record.unattributed), by_model)


def _zeros(layer: nn.Module, use: LayerCall) -> dict[str, Tensor]:
    """Return zeros that take no memory, by the places where a graph adds them to a call."""
    if not use.has_grads:
        return {}
    if not has_uncalled(layer):
        return {str(k): _flat_zero(grad) for k, grad in enumerate(use.output_grads) if grad is not None}
    tap, weights = Tap(), dict(layer.named_parameters(remove_duplicate=False))
    with torch.no_grad(), replay_rng(use.call.rng, next(layer.parameters()).device):
        forward_with_taps(layer, weights, arguments(layer, use.call), tap)
    return {name: _flat_zero(ys[0]).expand(len(ys), *ys[0].shape) for name, ys in tap.outputs.items()}


def _flat_zero(like: Any) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
