"""The explicit rows of parameters without a rule.

There are three ways to find them, each slower and more general than the one before:

1. run the layer again for each of its recorded calls (`rerun`);
2. run the whole model again, for parameters that are used outside of calls of their layers;
3. take one backward pass for each sample through the graph of the forward, which is exact for any model. The record
   keeps why, for the summary.

The first two are exact only if the module computes the same function again and does not mix samples. So the sum of the
rows, each times a random number, is compared with the gradient that autograd computes. If the two differ, the third
way is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.capture.rows.attribution import Attribution
from tengrad_triton.capture.rows.rerun import backward_rows, rerun_rows, sums_to
from tengrad_triton.capture.rows.unobserved import unobserved
from tengrad_triton.capture.rows.weights import multiply_samples, random_weights

# torch.func raises these for operations that it cannot transform.
_RERUN_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
_NOT_TRANSFORMED = (
    "torch.func cannot run the model again on single samples (as with autograd.grad in the forward, a batch cut by its "
    "values, or random numbers): write the derivatives with torch.func and choose samples by torch.where; then one "
    "batched pass gives the rows"
)
_OTHER_FUNCTION = (
    "the model computes something else when it is run again on single samples, because it is random, has a state, or "
    "mixes samples"
)
_BATCH_NORM = "batch norm mixes samples in training"


@runtime_checkable
class KnowsRows(Protocol):
    """A model with one output [N] a sample, that finds the rows of its outputs better than by single samples."""

    def rows_of_outputs(self, parameters: Mapping[str, Tensor], points: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the derivatives j_N… of every output with respect to parameters, at the arguments of a forward."""


class ExplicitRows:
    """Fills in ``Record.per_sample_grads``.

    Args:
        model: the model itself, not compiled.
        attribution: knows which layers to run again and which parameters are unattributed.
        include_unattributed: whether to find rows of unattributed parameters; otherwise they take the SGD step.
    """

    def __init__(self, model: nn.Module, attribution: Attribution, include_unattributed: bool) -> None:
        self._model = model
        self._attribution = attribution
        self._include_unattributed = include_unattributed

    def rerun_parameters(self, record: Record) -> list[Tensor]:
        """Return the parameters whose rows come from running a layer again, once for each layer that uses them."""
        return [p for named in self._attribution.rerun_layers(record).values() for p in named.values()]

    def unattributed(self, record: Record) -> list[Tensor]:
        """Return the parameters whose rows `fill_unattributed` has to find."""
        return self._attribution.unattributed(record) if self._include_unattributed else []

    def fill_by_layer(self, record: Record) -> list[Tensor]:
        """Fill in rows by running layers again; return the parameters whose rows did not sum to their gradient.

        The record must have its output gradients and gradient sums.
        """
        rows: dict[Tensor, list[Tensor]] = {}
        for name, parameters in self._attribution.rerun_layers(record).items():
            layer = self._attribution.layers[name].layer
            try:
                found = rerun_rows(layer, parameters, record.calls[name], record.samples, scale=1)
            except _RERUN_ERRORS:
                found = {}
            for name_within, parameter in parameters.items():
                rows.setdefault(parameter, []).extend([found[name_within]] if name_within in found else [])
        irreproducible = []
        for parameter, parts in rows.items():
            expected = record.gradient_sums.get(id(parameter))
            total = torch.stack(parts).sum(0) if parts else None
            if expected is None or total is None or not sums_to(total, expected):
                self._attribution.refute(record, parameter)
                irreproducible.append(parameter)
            else:
                record.per_sample_grads[id(parameter)] = total
        return irreproducible

    def fill_unattributed(
        self,
        record: Record,
        parameters: Sequence[Tensor],
        results: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> None:
        """Fill in rows of ``parameters`` by running the model again or, if that is not exact, from the graph.

        ``cotangents`` are the derivatives of the samples' losses with respect to ``results``, the tensors that the
        model returned.
        """
        parameters = [p for p in parameters if id(p) not in record.per_sample_grads]
        known = record.findings.only_by_graph
        rerun, why = [p for p in parameters if id(p) not in known], _BATCH_NORM
        if rerun and not record.mixes_samples:
            found, why = self._by_model(record, rerun, results, cotangents)
            record.per_sample_grads |= found
        rest = [p for p in parameters if id(p) not in record.per_sample_grads]
        if rest:
            record.by_backward |= {id(p): known.setdefault(id(p), why) for p in rest}
            rows = backward_rows(*_with_cotangent(results, cotangents), rest, record.samples)
            record.per_sample_grads |= {id(p): j for p, j in zip(rest, rows, strict=True)}

    def _by_model(
        self,
        record: Record,
        parameters: Sequence[Tensor],
        results: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> tuple[dict[int, Tensor], str]:
        """Run the model again; return, by the parameter's id, the rows that autograd confirms, and why not others."""
        named = {name: p for name, p in self._model.named_parameters() if any(p is other for other in parameters)}
        starts, given = _with_cotangent(results, cotangents)
        weights_N = random_weights(record.samples, given[0])
        expected = torch.autograd.grad(
            starts, list(named.values()), [multiply_samples(weights_N, c) for c in given],
            retain_graph=True, materialize_grads=True, allow_unused=True,
        )  # fmt: skip
        call = LayerCall.with_grads(record.call, list(cotangents), returns_tensor=False, samples_second=False)
        try:
            if isinstance(self._model, KnowsRows):
                with unobserved(self._model):
                    rows = self._model.rows_of_outputs(named, record.call.kwargs)
                rows = {name: multiply_samples(given[0], j) for name, j in rows.items()}
            else:
                rows = rerun_rows(self._model, named, [call], record.samples, 1, record.pick)
        except _RERUN_ERRORS:
            return {}, _NOT_TRANSFORMED
        weighted = {name: multiply_samples(weights_N, rows_N) for name, rows_N in rows.items()}
        pairs = zip(named.items(), expected, strict=True)
        confirmed = {id(p): rows[name] for (name, p), total in pairs if sums_to(weighted[name], total)}
        return confirmed, _OTHER_FUNCTION


def _with_cotangent(
    results: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [(result, c) for result, c in zip(results, cotangents, strict=True) if c is not None]
    return [result for result, _ in pairs], [c for _, c in pairs]
