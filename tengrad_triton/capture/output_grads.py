"""Output gradients and explicit rows, by backward passes from the model's output while its graph exists.

A backward pass here computes the derivatives with respect to the layers' outputs, but no gradient of a parameter that
has a rule. For the sampled and the exact Fisher the passes follow the forward, and start from derivatives of the
likelihood. For the empirical Fisher they start from the derivative of the caller's loss, within its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.batch_statistics import PassFlags
from tengrad_triton.capture.record import Record
from tengrad_triton.capture.rows.attribution import Attribution
from tengrad_triton.capture.rows.explicit import ExplicitRows
from tengrad_triton.capture.rows.proof import Cotangents, refuted
from tengrad_triton.capture.rows.rerun import batched_grads


class OutputGrads:
    """Fills in the output gradients of a record, and of an extra record for every further row of a sample.

    Args:
        attribution: knows the captured layers, and which parameters are unattributed.
        explicit_rows: finds the rows of parameters without a rule.
        flags: set during the backward passes.
    """

    def __init__(self, attribution: Attribution, explicit_rows: ExplicitRows, flags: PassFlags) -> None:
        self._attribution, self._explicit_rows, self._flags = attribution, explicit_rows, flags

    def fill(
        self, record: Record, results: Sequence[Tensor], cotangents: Sequence[Cotangents], *, batched: bool
    ) -> None:
        """Fill in the output gradients and the explicit rows, and compare them with autograd where this is due.

        Args:
            record: the record of the forward.
            results: the tensors at which the passes start.
            cotangents: for each row of a sample, the derivatives with respect to ``results``.
            batched: whether one pass computes several rows, which takes the memory of several.

        The record keeps its edges, for a further call with other cotangents.
        """
        edges = [edge for _, _, edge in record.outputs_in_graph()]
        rerun, unattributed = self._explicit_rows.rerun_parameters(record), self._explicit_rows.unattributed(record)
        records = [record, *(record.for_another_row() for _ in cotangents[1:])]
        record.extra_records[:] = records[1:]
        with self._flags.rows():
            each = _each_row(results, [*edges, *rerun], cotangents, batched)
            for of_row, grads, own in zip(records, each, cotangents, strict=True):
                # Behind those of the edges, `grads` has the derivatives with respect to `rerun`.
                for (call, place, _), grad in zip(of_row.outputs_in_graph(), grads, strict=False):
                    call.output_grads[place] = grad
                sums = zip(rerun, grads[len(edges) :], strict=True)
                of_row.gradient_sums = {id(p): torch.zeros_like(p) if g is None else g for p, g in sums}
                # Parameters whose rows a rerun of their module fails to reproduce are unattributed in all later rows.
                unattributed += self._explicit_rows.fill_by_layer(of_row) if rerun else []
                self._fill_unattributed(of_row, unattributed, results, own)
        if record.proves:
            self._prove(records, results, cotangents)

    def _prove(self, records: Sequence[Record], results: Sequence[Tensor], cotangents: Sequence[Cotangents]) -> None:
        """Compare the rows with autograd, and find those of refuted parameters from the graph."""
        layers, trained = self._attribution.layers, self._attribution.trained()
        with self._flags.rows(affine=True):
            wrong = refuted(records, results, cotangents, layers, trained)
        for parameter, why in wrong.items():
            too_large = self._attribution.why_too_large(records[0], parameter)
            self._attribution.refute(records[0], parameter, too_large or why)
        found = [p for p in self._explicit_rows.unattributed(records[0]) if any(p is other for other in wrong)]
        with self._flags.rows():
            for of_row, own in zip(records, cotangents, strict=True):
                for parameter in wrong:
                    of_row.per_sample_grads.pop(id(parameter), None)
                self._fill_unattributed(of_row, found, results, own)

    def _fill_unattributed(
        self, record: Record, parameters: Sequence[Tensor], results: Sequence[Tensor], cotangents: Cotangents
    ) -> None:
        if parameters and any(c is not None for c in cotangents):
            with self._flags.affine.set():
                self._explicit_rows.fill_unattributed(record, parameters, results, cotangents)


def _each_row(
    results: Sequence[Tensor], wanted: Sequence[Any], cotangents: Sequence[Cotangents], batched: bool
) -> Iterator[Sequence[Tensor | None]]:
    """Yield the derivatives with respect to ``wanted``, which are edges and parameters, for one row at a time."""
    used = [place for place in range(len(results)) if any(row[place] is not None for row in cotangents)]
    if not wanted or not used:
        for _ in cotangents:
            yield [None] * len(wanted)
        return
    starts = [results[place] for place in used]
    rows = [[_or_zeros(row[place], results[place]) for place in used] for row in cotangents]
    if batched:
        yield from batched_grads(starts, wanted, [torch.stack(of_rows) for of_rows in zip(*rows, strict=True)])
        return
    for row in rows:
        yield torch.autograd.grad(starts, wanted, row, retain_graph=True, allow_unused=True)


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent
