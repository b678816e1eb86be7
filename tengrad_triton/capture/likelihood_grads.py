"""The rows of the sampled and the exact Fisher: derivatives of the likelihood, found right after the forward.

Dimensions: N samples, R rows of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tengrad_triton.capture.output_grads import OutputGrads
from tengrad_triton.capture.outputs import map_tensors
from tengrad_triton.capture.record import Record
from tengrad_triton.capture.rows.proof import Cotangents
from tengrad_triton.capture.rows.rerun import batched_grads
from tengrad_triton.likelihoods import Fisher, HasHessianFactor, Likelihood


class LikelihoodGrads:
    """Fills in the output gradients of a record from derivatives of the likelihood.

    Args:
        output_grads: runs the backward passes.
        fisher: ``"sampled"``: a row for each label drawn from the likelihood; ``"exact"``: a row for each column of the
            likelihood's Hessian factor.
        likelihood: the likelihood whose negative logarithm the rows are derivatives of.
        generator: the random number generator that draws the labels.
        draws: how many labels are drawn for each sample.
        max_hessian_factor_bytes: the most bytes that the exact Hessian factor may take.
    """

    def __init__(
        self,
        output_grads: OutputGrads,
        fisher: Fisher,
        likelihood: Likelihood,
        generator: torch.Generator,
        draws: int,
        max_hessian_factor_bytes: float,
    ) -> None:
        self._output_grads = output_grads
        self._fisher, self._likelihood, self._generator, self._draws = fisher, likelihood, generator, draws
        self._max_hessian_factor_bytes, self._forwards = max_hessian_factor_bytes, 0  # those that have drawn labels

    def after_forward(self, record: Record, selected: Any, results: Sequence[Tensor]) -> None:
        """Fill in the output gradients, and the explicit rows of parameters without a rule.

        ``results`` are the tensors that require gradients in ``selected``, the part of the output that the likelihood
        sees.

        Raises:
            ValueError: the likelihood depends on an output without an entry for each sample, or does not support the
                shape of the output.
        """
        # Derivatives with respect to copies: one output may be computed from another one.
        leaves: list[Tensor] = []

        def copy(x: Tensor) -> Tensor:
            own = x.detach()
            if any(x is result for result in results):
                leaves.append(own.requires_grad_())
            return own

        if self._fisher == "sampled":
            record.drawn, self._forwards = (self._forwards, self._generator.get_state()), self._forwards + 1
        seen = map_tensors(copy, selected)
        with torch.enable_grad():
            cotangents = self._exact(seen, leaves) if self._fisher == "exact" else self._sampled(seen, leaves)
        _check_samples(record.samples, cotangents)
        self._output_grads.fill(record, results, cotangents, batched=self._fisher == "exact")
        for of_row in (record, *record.extra_records):
            of_row.release_edges()

    def take_back(self, records: Sequence[Record]) -> None:
        """Give the generator the state back that it had before the first of the forwards in ``records``."""
        drawn = [record.drawn for record in records if record.drawn is not None]
        if drawn:
            self._generator.set_state(min(drawn, key=lambda one: one[0])[1])

    def _exact(self, output: Any, leaves: Sequence[Tensor]) -> list[Cotangents]:
        _check_factor_size(output, self._max_hessian_factor_bytes)
        factor_RN = cast("HasHessianFactor", self._likelihood).hessian_factor(output)
        factor_RN = factor_RN * len(factor_RN) ** 0.5  # F is the mean over the R rows of each sample
        if any(output is leaf for leaf in leaves):
            return [[factor if leaf is output else None for leaf in leaves] for factor in factor_RN]
        return [list(grads) for grads in batched_grads([output], leaves, [factor_RN])]

    def _sampled(self, output: Any, leaves: Sequence[Tensor]) -> list[Cotangents]:
        rows: list[Cotangents] = []
        for _ in range(self._draws):
            target = self._likelihood.sample(map_tensors(Tensor.detach, output), self._generator)
            nll = self._likelihood.nll(output, target)  # the sum of the samples' own losses: no factor N follows
            rows.append(torch.autograd.grad(nll, leaves, retain_graph=True, allow_unused=True))
        return rows


def _check_samples(samples: int, cotangents: Sequence[Cotangents]) -> None:
    for cotangent in (c for row in cotangents for c in row if c is not None):
        if not cotangent.dim() or len(cotangent) != samples:
            raise ValueError(
                f"the likelihood depends on an output of shape {tuple(cotangent.shape)}, but the batch has {samples} "
                "samples: pass output=, a function that returns outputs with the samples as their first dimension"
            )


def _check_factor_size(output: Any, max_hessian_factor_bytes: float) -> None:
    if not isinstance(output, Tensor) or not output.dim():  # the likelihood says what it expects
        return
    rows = output[0].numel()
    needed = rows * output.numel() * output.element_size()
    if needed > max_hessian_factor_bytes:
        raise ValueError(
            f"fisher='exact' takes {rows} rows for each of {len(output)} samples: the derivatives with respect to the "
            f"model's output alone need {needed / 2**30:.2f} GiB, where max_bytes allows "
            f"{max_hessian_factor_bytes / 2**30:.2f} GiB: use fisher='sampled' with fisher_samples=, or raise max_bytes"
        )
