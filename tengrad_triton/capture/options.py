"""The settings of a capture."""

from __future__ import annotations

from dataclasses import dataclass

from tengrad_triton.capture.outputs import Select
from tengrad_triton.capture.rows.attribution import Verify
from tengrad_triton.likelihoods import Fisher, Likelihood


@dataclass(frozen=True)
class CaptureOptions:
    """Which rows a capture records.

    Attributes:
        fisher: ``"sampled"``: derivatives of the likelihood at labels drawn from the model's own output; they take one
            more backward pass. ``"exact"``: derivatives for every column of the likelihood's Hessian factor (M9).
            ``"empirical"``: derivatives of the caller's loss.
        likelihood: the distribution from which labels are drawn.
        draws: how many labels are drawn for each sample.
        output: which part of the model's output the likelihood sees.
        verify: when the rows are compared with autograd.
        max_bytes: the most bytes that the exact Hessian factor, or the rows of one parameter without a rule, may take.
        include_unattributed: whether to find the rows of unattributed parameters.
    """

    fisher: Fisher
    likelihood: Likelihood
    draws: int = 1
    output: Select = None
    verify: Verify = "change"
    max_bytes: float = float("inf")
    include_unattributed: bool = False
