"""The proof that rows are right: autograd's own derivative of a random combination of the samples' losses.

For random weights r_n the sum Σ_n r_n J_n over the rows of a parameter must be the gradient of Σ_n r_n ℓ_n. One
backward pass gives that gradient for all parameters. Rows that lack a use of their parameter, that a wrong rule gives,
or that belong to other samples, do not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.capture.rows.rule import contributions_of, pairs_of_calls
from tengrad_triton.capture.rows.weights import multiply_samples, precision_of, random_weights, weighted_sum
from tengrad_triton.layers import PerSampleGrads, matrix_view, tensors_in

_OTHER_SAMPLES = "its outputs for one sample reach the losses of other samples"
_OTHER_ROWS = "the calls of its layer do not give its rows, as with derivatives in the forward, or its rule is wrong"
Cotangents = Sequence[Tensor | None]
"""For each tensor at which the passes for rows start, the derivative [N, …] of the samples' losses, or None."""


@dataclass
class _Sum:
    """Σ_n r_n J_n of one parameter, flat, and a bound on the size of what was added up."""

    total: Tensor | float = 0.0
    size: Tensor | float = 0.0

    def add(self, total: Tensor, size: Tensor) -> None:
        """Add the part of one call."""
        self.total, self.size = self.total + total, self.size + size.to(total.dtype)


def refuted(
    records: Sequence[Record],
    results: Sequence[Tensor],
    cotangents: Sequence[Cotangents],
    layers: Mapping[str, CapturedLayer],
    parameters: Sequence[Tensor],
) -> dict[Tensor, str]:
    """Return the parameters whose rows are not those of autograd, with the reason.

    Args:
        records: the records of one forward with all their rows, one for each row of a sample.
        results: the tensors at which the backward passes for rows start.
        cotangents: for each record, the derivatives with respect to ``results``.
        layers: the captured layers, by name.
        parameters: the parameters to check. Those that a record has as unattributed are left out.
    """
    checked = [p for p in parameters if id(p) not in records[0].unattributed]
    like = next((c for row in cotangents for c in row if c is not None), None)
    if like is None:
        return {}
    weights_N = random_weights(records[0].samples, like)
    wrong = _differing(records, results, cotangents, layers, checked, weights_N)
    if not wrong:
        return {}
    # Rows that belong to other samples have the right sum.
    even = _differing(records, results, cotangents, layers, wrong, torch.ones_like(weights_N))
    return {p: _OTHER_ROWS if any(p is other for other in even) else _OTHER_SAMPLES for p in wrong}


def _differing(
    records: Sequence[Record],
    results: Sequence[Tensor],
    cotangents: Sequence[Cotangents],
    layers: Mapping[str, CapturedLayer],
    parameters: Sequence[Tensor],
    weights_N: Tensor,
) -> list[Tensor]:
    """Return the parameters for which Σ_n r_n J_n, over the rows of all records, differs from autograd's."""
    weights_R = random_weights(len(records) + 1, weights_N)[1:].tolist()
    pairs = []
    for place, result in enumerate(results):
        of_rows = [w * row[place] for w, row in zip(weights_R, cotangents, strict=True) if row[place] is not None]
        if of_rows:
            pairs.append((result, multiply_samples(weights_N, torch.stack(of_rows).sum(0))))
    if not pairs or not parameters:
        return []
    starts, weighted = zip(*pairs, strict=True)
    expected = torch.autograd.grad(
        starts, list(parameters), weighted, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    sums: dict[int, _Sum] = {id(p): _Sum() for p in parameters}
    failed: set[int] = set()
    for weight, record in zip(weights_R, records, strict=True):
        for name, layer in layers.items():
            _add_layer(sums, failed, weight, record, name, layer, weights_N)
        for key, rows in record.per_sample_grads.items():
            if key in sums:
                sums[key].add(weight * weighted_sum(PerSampleGrads(rows), weights_N), rows.norm())
    pairs_of_sums = [(p, grad, sums[id(p)]) for p, grad in zip(parameters, expected, strict=True)]
    dtype = _coarsest(records[0], results, parameters)
    return [p for p, grad, own in pairs_of_sums if id(p) not in failed and not _agrees(own, grad, dtype)]


def _add_layer(
    sums: Mapping[int, _Sum],
    failed: set[int],
    weight: float,
    record: Record,
    name: str,
    layer: CapturedLayer,
    weights_N: Tensor,
) -> None:
    """Add what the calls of one layer contribute; a rule that raises raises again when the step calls it."""
    calls = [call for call in record.calls.get(name, []) if call.has_grads]
    if not layer.has_rule or name in record.unbatched or not calls:
        return
    try:
        found = contributions_of(
            {name: layer}, lambda _: pairs_of_calls(name, calls, 1), {}, record.unattributed, record.samples
        )
    except Exception:
        failed.update(id(p) for p in layer.parameters.values())
        return
    size = _size_of(calls)
    for key, contributions in found.items():
        for one in contributions if key in sums else ():
            sums[key].add(weight * weighted_sum(one, weights_N), size)


def _coarsest(record: Record, results: Sequence[Tensor], parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the least precise type in a backward pass: what is rounded in one layer goes on to those before it."""
    of_calls = [g for call in record.all_calls() for g in call.output_grads if g is not None]
    return max((x.dtype for x in (*of_calls, *results, *parameters)), key=lambda one: torch.finfo(one).eps)


def _size_of(calls: Sequence[LayerCall]) -> Tensor:
    """Return a bound on the norms of the products that the rows of these calls are sums of."""

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [x.detach().double().norm() for x in tensors if x.is_floating_point()] or [torch.ones(())]
        ).sum()

    grads = [norm([g for g in call.output_grads if g is not None]) for call in calls]
    inputs = [norm(tensors_in((call.call.args, call.call.kwargs))).clamp(min=1) for call in calls]
    return torch.stack([g * x.to(g.device) for g, x in zip(grads, inputs, strict=True)]).sum()


def _agrees(own: _Sum, grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether the two agree within rounding errors, which differ between two ways to add the same numbers up.

    ``dtype`` is the least precise type that they come from.
    """
    expected = matrix_view(grad.to_dense() if grad.is_sparse else grad).flatten()
    if not torch.isfinite(expected).all():
        return True  # nothing can be said; the step itself will not use such rows
    eps = precision_of(dtype, grad.device)
    off = (expected - own.total).norm()
    # The square root of the precision is far above rounding errors and far below the difference of another function.
    # The second term is for gradients that are nearly zero because large terms cancel.
    return bool(off <= eps**0.5 * expected.norm() + eps**0.75 * own.size)
