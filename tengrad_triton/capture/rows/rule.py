"""The rows that follow from the recorded calls of layers by the rules of these layers.

The plain step and the compiled step capture calls in different ways; from here on both run the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.blocks import CapturedLayer, full_name
from tengrad_triton.capture.record import LayerCall
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import Call, Contribution, Inputs, OuterProducts, PerSampleGrads, canonical

ById = dict[int, list[Contribution]]
"""What the calls of one micro-batch contribute to each parameter, by the parameter's id."""
Pairs = Sequence[tuple[Any, Any]]
"""The input and the output gradients of each call of a layer."""


def pairs_of_calls(name: str, calls: Sequence[LayerCall], scale: float) -> Pairs:
    """Return what the rule of the layer ``name`` gets for its calls, with the output gradients times ``scale``."""
    return [(call.inputs(name), call.scaled_grads(scale)) for call in calls if call.has_grads]


def contributions_of(
    layers: Mapping[str, CapturedLayer],
    pairs_of: Callable[[str], Pairs],
    per_sample_grads: Mapping[int, Tensor],
    unattributed: Collection[int],
    samples: int,
) -> ById:
    """Return what one micro-batch contributes to every parameter.

    Args:
        layers: the captured layers that have a rule, by name.
        pairs_of: the captured calls of a layer, by its name.
        per_sample_grads: rows [N, …] that were found without a rule, by the parameter's id.
        unattributed: the ids of parameters whose rows do not follow from their layers' calls.
        samples: N of the micro-batch.

    Raises:
        ValueError: a rule returned rows of another size than its parameter, or of other samples.
        TypeError: a rule returned no mapping, or something else than a contribution in it.
    """
    found: ById = {key: [PerSampleGrads(rows)] for key, rows in per_sample_grads.items()}
    for name, layer in layers.items():
        wanted = {id(p) for p in layer.parameters.values() if p.requires_grad} - set(unattributed)
        for x, output_grads in pairs_of(name) if wanted else ():
            rule = canonical(layer.layer, *_wide_enough(x, output_grads, layer.takes_half_precision))
            if not isinstance(rule, Mapping):
                raise TypeError(
                    f"the rule for {type(layer.layer).__name__} returned a {type(rule).__name__}: return a dictionary "
                    'from the names of parameters to contributions, such as {"weight": PerSampleGrads(rows)}'
                )
            for param_name, parameter in layer.parameters.items():
                if param_name in rule:
                    one = _checked(rule[param_name], parameter, samples, layer.layer, full_name(name, param_name))
                    if id(parameter) in wanted:
                        found.setdefault(id(parameter), []).append(one)
    return found


def _checked(one: Contribution, parameter: Tensor, samples: int, layer: nn.Module, name: str) -> Contribution:
    """Return a rule's result, explicit rows in the parameter's shape; raise `ValueError` if its sizes are wrong."""
    rule = f"the rule for {type(layer).__name__}"
    if not isinstance(one, Contribution):
        raise TypeError(
            f"{rule} returned a {type(one).__name__} for {name!r}: return a contribution, PerSampleGrads(rows) with a "
            "row of each sample or OuterProducts(inputs, output gradients)"
        )
    if isinstance(one, OuterProducts) and isinstance(one.a, Tensor):
        if not 2 <= one.a.dim() <= 4 or not 2 <= one.g_NGPO.dim() <= 4:
            sizes = f"{tuple(one.a.shape)} and {tuple(one.g_NGPO.shape)}"
            raise ValueError(
                f"{rule} returned OuterProducts of {sizes} for {name!r}: expected [N, G, P, I], [N, G, P, O]"
            )
        one = OuterProducts(_with_groups_and_positions(one.a), _with_groups_and_positions(one.g_NGPO))
    if one.entries != parameter.numel():
        raise ValueError(
            f"{rule} returned rows of {one.entries} entries for {name!r}, which has {parameter.numel()} entries"
        )
    if one.samples != samples:
        raise ValueError(f"{rule} returned {one.samples} rows for {name!r}, but the batch has {samples} samples")
    return PerSampleGrads(one.j_NK.reshape(-1, *parameter.shape)) if isinstance(one, PerSampleGrads) else one


def _with_groups_and_positions(x: Tensor) -> Tensor:
    """Return [N, I] or [N, P, I] as [N, G, P, I], with one group, and one position where there is none."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, -1, x.shape[-1])


def _wide_enough(x: Inputs, output_grads: Any, takes_half_precision: bool) -> tuple[Inputs, Any]:
    """Return what a rule gets: float32 in place of half precision, unless it takes that and both tensors have it.

    A product of two half-precision numbers is exact in float32, so that rows of J from such factors are no less exact.
    """
    one_each = isinstance(x, Tensor) and isinstance(output_grads, Tensor) and x.dtype == output_grads.dtype
    if one_each and takes_half_precision:
        return x, output_grads
    return _widen(x), _widen(output_grads)


def _widen(value: Any) -> Any:
    """Return the half-precision tensors of any nested structure in float32."""
    if isinstance(value, Call):
        return replace(value, args=_widen(value.args), kwargs=_widen(dict(value.kwargs)))
    return tree_map_only(Tensor, widen, value)
