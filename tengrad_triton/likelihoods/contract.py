"""Whether a loss is the one of a likelihood, from its derivative with respect to the output (docs/math.md, M16).

Dimensions: N samples, T tokens, C classes, S rows of C classes (samples or tokens), D outputs of a sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.likelihoods.regression import (
    Factors,
    Lines,
    factors,
    rounding,
    through_points,
    through_zero,
    underflow,
)

_ELEMENTS = 2**22  # of a part of the output: what a check takes in memory beside the output
_TIES = 8  # how many outputs have the same derivative by chance: never so many different ones
_COARSE = 1e-4  # relative rounding errors above this one make many derivatives equal
_OTHERS = "use likelihood='gaussian' for mse_loss, 'bernoulli' for binary_cross_entropy_with_logits, or your own object"


class _Rows(NamedTuple):
    """What is known of each row of classes, each [S]."""

    slope: Tensor  # these four are those of `Lines`
    bound: Tensor
    fits: Tensor
    log_odds: Tensor
    silent: Tensor  # without any derivative, though one is to be expected
    total: Tensor  # the sum over the classes
    total_differs: Tensor  # whether it is not 0
    least: Tensor  # of the targets that the derivative belongs to
    most: Tensor
    no_target: Tensor  # whether they are no distribution


def why_not_categorical(output: Tensor, grad: Tensor, omega: Tensor, ignores: bool) -> str | None:
    """Return why the derivative is not ω (p − y) with targets y that are distributions, or None.

    Args:
        output: logits [N, …, C].
        grad: the derivative of each sample's own loss with respect to them.
        omega: ω of each label [N, …].
        ignores: whether the labels are known, so that ω is 0 for ignored ones.
    """
    if not _says_something(grad):
        return None
    output_SC, grad_SC, omega_S = output.flatten(0, -2), grad.flatten(0, -2), omega.reshape(-1)
    count_S = omega_S > 0
    stray = int((~count_S & (grad_SC != 0).any(1)).sum())
    if stray:
        return (
            f"{stray} labels that do not count, by likelihood.target or sample_weight, have a derivative other than 0: "
            "set both to those of this batch"
        )
    if not bool(count_S.all()):
        output_SC, grad_SC, omega_S = output_SC[count_S], grad_SC[count_S], omega_S[count_S]
    error, samples = rounding(output, grad), len(output)
    scale = (grad_SC.abs().amax(1) / omega_S).max().clamp(min=1)
    part = max(1, _ELEMENTS // output.shape[-1])
    parts = zip(output_SC.split(part), grad_SC.split(part), omega_S.split(part), strict=True)
    found_in = [_rows_of(*_terms(o, g, omega, samples, scale)) for o, g, omega in parts]
    rows = _Rows(*map(torch.cat, zip(*found_in, strict=True)))
    if (silent := int(rows.silent.sum())) > _by_chance(len(output_SC) * error ** (output.shape[-1] - 1)):
        return _silence(silent, len(output_SC), "labels", not ignores)
    lines = Lines(rows.slope, rows.bound, rows.fits, rows.log_odds)
    if output.shape[-1] == 2:
        lines = _two_classes(*(value[:, 1] for value in _terms(output_SC, grad_SC, omega_S, samples, scale)))
    found = factors(lines)
    if found is not None:
        return _factor_reason(found, len(output))
    return _total_reason(rows) or _target_reason(rows.least, rows.most, rows.no_target)


def why_not_bernoulli(output: Tensor, grad: Tensor, omega: Tensor) -> str | None:
    """Return why the derivative is not ω (p − y) with targets y in [0, 1], or None.

    Args:
        output: logits [N, …].
        grad: the derivative of each sample's own loss with respect to them.
        omega: the weight of each output's Hessian in its sample's own loss, shaped like the output.
    """
    if not _says_something(grad):
        return None
    stray = int(((omega == 0) & (grad != 0)).sum())
    if stray:
        return f"{stray} outputs whose sample_weight is 0 have a derivative: set sample_weight of this batch"
    counts, error = omega > 0, rounding(output, grad)
    omega = omega[counts]
    p, h = output[counts].to(omega.dtype).sigmoid(), grad[counts].to(omega.dtype) / omega
    noise = underflow(len(output), output, grad) / omega
    tolerance = error * (h.abs().max().clamp(min=1) * (p + torch.special.entr(p)) + h.abs()) + noise
    silent = int(((h == 0) & (torch.minimum(p, 1 - p) > 8 * tolerance) & ((p - 0.5).abs() > tolerance)).sum())
    if silent > _by_chance(len(h) * error):
        return _silence(silent, len(h), "outputs", False)
    found = factors(_two_classes(p, h, tolerance))
    if found is not None:
        return _factor_reason(found, len(output))
    y = p - h
    return _target_reason(y, y, (y < -tolerance) | (y > 1 + tolerance))


def why_not_squares(output: Tensor, grad: Tensor) -> str | None:
    """Return why the derivative cannot be that of squared errors, whatever the targets, or None.

    Any derivative fits some targets. Only targets that would follow the outputs digit by digit are out of the question.
    """
    error = rounding(output, grad)
    if not _says_something(grad) or error > _COARSE:
        return None
    flat = grad.flatten()
    top = flat.abs().max() * flat[flat.abs().argmax()].sign()
    tied = (flat - top).abs() <= error * top.abs()
    if _different(output.flatten()[tied]) >= _TIES:
        return (
            f"the derivative is exactly the same, {float(top):.3g} for each sample, at {int(tied.sum())} of "
            f"{len(flat)} outputs that differ, as of an absolute or a Huber error: the loss is not the mean squared "
            "error: use mse_loss, or your own likelihood"
        )
    for dim in {1, output.dim() - 1} if output.dim() > 1 else ():
        sums, sizes = grad.sum(dim), grad.abs().sum(dim)
        still = bool((sums.abs() <= error * sizes.max()).all()) and bool((sizes > 0).all())
        if still and output.shape[dim] > 1 and _different(output.sum(dim)) >= _TIES:
            return (
                f"the derivative sums to 0 over dimension {dim} of the output, as of a cross entropy: the loss is not "
                "the mean squared error: use likelihood='categorical' for cross_entropy"
            )
    return None


def why_not_this(output: Tensor, grad: Tensor, expected: Tensor, size: Tensor, name: str) -> str | None:
    """Return why the derivative is not the ``expected`` one, or None.

    Args:
        output: the model's output [N, …, K].
        grad: the derivative of each sample's own loss with respect to it.
        expected: that of the likelihood's loss, at least in float32.
        size: how large the numbers are whose difference is ``expected``; it broadcasts to the output.
        name: the likelihood's loss, in words.
    """
    if not _says_something(grad):
        return None
    given, error = grad, rounding(output, grad)
    grad, size = grad.to(expected.dtype), size.expand_as(output)
    # The factor of the mean is rounded, to a number that float16 hardly has if there are many outputs.
    noise = underflow(len(output), output, given) + underflow(output.numel(), output, given) * size
    if bool(((grad - expected).abs() <= error * (size + grad.abs()) + noise).all()):
        return None
    scale = (grad.abs().max() / expected.abs().max().clamp(min=1e-30)).clamp(min=1)
    tolerance = error * (scale * size + grad.abs()) + noise
    wide_rows = (value.reshape(-1, output.shape[-1]) for value in (expected, grad, tolerance))
    found = factors(through_zero(*wide_rows))
    if found is not None:
        return _factor_reason(found, len(output))
    differs = float((grad - expected).abs().max())
    return (
        f"the derivative differs from that of {name} by up to {differs:.3g}, where that is at most "
        f"{float(expected.abs().max()):.3g}: the loss is another one: set the likelihood's weights and the target of "
        "this batch to those of the loss"
    )


def _says_something(grad: Tensor) -> bool:
    """Whether the derivative is finite, and not 0 everywhere."""
    return bool(grad.isfinite().all()) and bool((grad != 0).any())


def _terms(o: Tensor, g: Tensor, omega_S: Tensor, samples: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probabilities p, the derivative h = g / ω, and the rounding error of p − y − h; each [S, C]."""
    p, h = o.to(omega_S.dtype).softmax(1), g.to(omega_S.dtype) / omega_S[:, None]
    # p = exp(log p), so its relative error grows with −log p; a sum over C in a row, with 8 lanes, makes C / 8 errors.
    of_sum = torch.finfo(h.dtype).eps * h.shape[1] / 8
    tolerance = rounding(o, g) * (scale * (p + torch.special.entr(p)) + h.abs()) + of_sum * scale * p
    return p, h, tolerance + underflow(samples, o, g) / omega_S[:, None]


def _rows_of(p: Tensor, h: Tensor, tolerance: Tensor) -> _Rows:
    """Return what is known of the rows, from the `_terms`.

    If the target of a row is one class k, or that class smoothed, then p and h are on a line, but for class k.
    """
    label = h.argmin(1, keepdim=True)
    others = torch.ones_like(h, dtype=torch.bool).scatter(1, label, False)
    lines = through_points(p, h, tolerance, others, intercept=h.shape[1] > 3)
    spread = p.amax(1) - p.amin(1) > 8 * tolerance.amax(1)  # at equal p, the targets may all be equal too
    saturated = 1 - p.amax(1) <= 8 * tolerance.amax(1)
    total, y = h.sum(1), p - h
    return _Rows(
        lines.slope, lines.bound, lines.fits, lines.log_odds, (h == 0).all(1) & spread & ~saturated,
        total, total.abs() > tolerance.sum(1), y.amin(1), y.amax(1), (y < -tolerance).any(1),
    )  # fmt: skip


def _two_classes(p: Tensor, h: Tensor, tolerance: Tensor) -> Lines:
    """Return the lines of the outputs with a positive and of those with a negative label: |h| over |p − y|."""
    p, h, tolerance = p.flatten(), h.flatten(), tolerance.flatten()
    mask = torch.stack([h < 0, h > 0])
    return through_points(torch.stack([1 - p, p]), h.abs().expand(2, -1), tolerance.expand(2, -1), mask, True)


def _different(values: Tensor) -> int:
    """Return how many values differ by more than a thousandth of their range."""
    low, high = values.min(), values.max()
    return int(((values - low) / (high - low) * 1000).round().unique().numel()) if high > low else 1


def _by_chance(expected: float) -> float:
    """Return how many targets may equal p to the last digit, if so many are expected at most."""
    return 8 * expected + (3 if expected > 1e-6 else 0)


def _silence(silent: int, of: int, what: str, may_be_ignored: bool) -> str:
    remedy = "set likelihood.target, so that those with ignore_index do not count, or" if may_be_ignored else "set"
    return (
        f"{silent} of {of} {what} have no derivative, so they have no part in the loss, but they are counted: {remedy} "
        "likelihood.sample_weight to the loss's weights of the samples"
    )


def _factor_reason(found: Factors, samples: int) -> str:
    low, high = found.low, found.high
    if not found.constant:
        return (
            f"for some labels the derivative is {low:.3g}{f' to {high:.3g}' if high > low else ''} times that of the "
            "likelihood's loss, as with weights of classes or samples, or a focal loss: set the likelihood's weight or "
            "pos_weight with target, or sample_weight, or pass your own likelihood"
        )
    is_sum = samples > 1 and abs(low / samples - 1) < 1e-2
    return (
        f"the derivative is {low:.3g} times that of the mean over the samples, as of "
        f"{f'a sum over the {samples} samples' if is_sum else 'another reduction'}, a factor, or a loss that "
        "GradScaler scales by a constant: use reduction='mean' without a factor, or choose the learning rate for it"
    )


def _total_reason(rows: _Rows) -> str | None:
    if not bool(rows.total_differs.any()):
        return None
    worst = rows.total[rows.total.abs().argmax()]
    return (
        f"the derivative sums to {float(worst):.3g} over the classes, where that of a cross entropy sums to 0: the "
        f"loss is not a cross entropy of these logits alone: {_OTHERS}"
    )


def _target_reason(least: Tensor, most: Tensor, no_target: Tensor) -> str | None:
    if not bool(no_target.any()):
        return None
    return (
        f"no targets fit this derivative: they would be between {float(least.min()):.3g} and {float(most.max()):.3g}, "
        f"but must be between 0 and 1, in {int(no_target.sum())} of {len(no_target)} cases: the loss has a factor or "
        "weights, or is not the cross entropy of these logits: take the mean over the samples, set the weights, "
        f"{_OTHERS}"
    )
