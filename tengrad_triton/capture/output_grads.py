"""Output gradients of the sampled and the exact Fisher: computed right after the forward, before the caller's backward.

The rows of J are here derivatives of the likelihood and not of the caller's loss. A backward pass here computes the
derivatives with respect to the layers' outputs, but no gradient of a parameter that has a rule.

Dimensions: N samples, R rows of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.explicit_rows import ExplicitRows
from tengrad_triton.capture.flag import ScopedFlag
from tengrad_triton.capture.record import Record
from tengrad_triton.capture.rerun import batched_grads
from tengrad_triton.likelihoods import Fisher, HasHessianFactor, Likelihood

RowGrads = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""For one row of each sample: the derivatives with respect to what ``wanted`` lists, and to what the model returned."""


class OutputGrads:
    """Fills in the output gradients of a record, and of an extra record for every further row of a sample.

    Args:
        fisher: ``"sampled"``: a row for each label drawn from the likelihood; ``"exact"``: a row for each column of the
            likelihood's Hessian factor.
        likelihood: the likelihood whose negative logarithm the rows are derivatives of.
        generator: the random number generator that draws the labels.
        draws: how many labels are drawn for each sample.
        max_hessian_factor_bytes: the most bytes that the exact Hessian factor may take.
        explicit_rows: finds the rows of parameters without a rule.
        detached_statistics: a flag that is set during the backward passes.
    """

    def __init__(
        self,
        fisher: Fisher,
        likelihood: Likelihood,
        generator: torch.Generator,
        draws: int,
        max_hessian_factor_bytes: float,
        explicit_rows: ExplicitRows,
        detached_statistics: ScopedFlag,
    ) -> None:
        self._fisher = fisher
        self._likelihood = likelihood
        self._generator = generator
        self._draws = draws
        self._max_hessian_factor_bytes = max_hessian_factor_bytes
        self._explicit_rows = explicit_rows
        self._detached_statistics = detached_statistics

    def after_forward(self, record: Record, output: Any, results: Sequence[Tensor]) -> None:
        """Fill in the output gradients, and the explicit rows of parameters without a rule.

        ``results`` are the tensors in the model's ``output`` that require gradients.
        """
        edges = [edge for _, _, edge in record.outputs_in_graph()]
        rerun, unattributed = self._explicit_rows.rerun_parameters(record), self._explicit_rows.unattributed(record)
        if not edges and not unattributed:
            return
        with self._detached_statistics.set():
            for index, (grads, cotangents) in enumerate(self._each_row(output, results, [*edges, *rerun])):
                of_row = record if index == 0 else record.for_another_row()
                if index > 0:
                    record.extra_records.append(of_row)
                # Behind those of the edges, `grads` has the derivatives with respect to `rerun`.
                for (call, place, _), grad in zip(of_row.outputs_in_graph(), grads, strict=False):
                    call.output_grads[place] = grad
                sums = zip(rerun, grads[len(edges) :], strict=True)
                of_row.gradient_sums = {id(p): torch.zeros_like(p) if g is None else g for p, g in sums}
                # Parameters whose rows a rerun of their module fails to reproduce are unattributed in all later rows.
                unattributed += self._explicit_rows.fill_by_layer(of_row) if rerun else []
                self._explicit_rows.fill_unattributed(of_row, unattributed, results, cotangents)
        for of_row in (record, *record.extra_records):
            of_row.release_edges()

    def find_remaining_rows(self, record: Record) -> None:
        """Do nothing: the record has all its rows since the forward."""

    def _each_row(self, output: Any, results: Sequence[Tensor], wanted: Sequence[Any]) -> Iterator[RowGrads]:
        """Yield the derivatives for one row of each sample at a time; ``wanted`` are edges and parameters."""
        if self._fisher == "exact":
            _check_factor_size(output, self._max_hessian_factor_bytes)
            factor_RN = cast("HasHessianFactor", self._likelihood).hessian_factor(output)
            factor_RN = factor_RN * len(factor_RN) ** 0.5  # F is the mean over the R rows of each sample
            for index, grads in enumerate(batched_grads([output], wanted, [factor_RN])):
                yield grads, [factor_RN[index]]
            return
        for _ in range(self._draws):
            target = self._likelihood.sample(tree_map_only(Tensor, Tensor.detach, output), self._generator)
            nll = self._likelihood.nll(output, target)  # the sum of the samples' own losses: no factor N follows
            grads = torch.autograd.grad(nll, [*wanted, *results], retain_graph=True, allow_unused=True)
            of_results = zip(results, grads[len(wanted) :], strict=True)
            yield grads[: len(wanted)], [torch.zeros_like(r) if g is None else g for r, g in of_results]


def _check_factor_size(output: Tensor, max_hessian_factor_bytes: float) -> None:
    rows = output[0].numel()
    needed = rows * output.numel() * output.element_size()
    if needed > max_hessian_factor_bytes:
        raise ValueError(
            f"fisher='exact' takes {rows} rows for each of {len(output)} samples: the derivatives with respect to the "
            f"model's output alone need {needed / 2**30:.2f} GiB, where max_bytes allows "
            f"{max_hessian_factor_bytes / 2**30:.2f} GiB: use fisher='sampled' with fisher_samples=, or raise max_bytes"
        )
