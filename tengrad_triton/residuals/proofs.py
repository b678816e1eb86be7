"""Whether rows that were found for all points at once are those of autograd.

Dimensions: N points of a term, M residuals at each point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tengrad_triton.capture.rows.weights import random_weights


def is_finite(r: Tensor, grads: Sequence[Tensor]) -> bool:
    """Whether all residuals and gradients are finite."""
    return all(bool(x.isfinite().all()) for x in (r, *grads))


def agree(
    r: Tensor, rows: Sequence[Tensor], expected: tuple[Tensor, list[Tensor]], parameters: Sequence[Tensor]
) -> bool:
    """Whether residuals and rows are those of the whole batch, within sqrt(eps).

    Args:
        r: residuals [N, …] to be proved.
        rows: [N, …, *parameter.shape] of each parameter, to be proved.
        expected: the residuals of the whole batch, and the gradient of their sum weighted by `random_weights`. Where
            they are not finite nothing is compared: the caller refuses them.
        parameters: the trained ones.

    A residual that is nearly zero is the difference of large numbers, whose rounding errors are not small beside it.
    ‖J‖ ‖θ‖ has the size of those numbers. So are the rows of a parameter on which the residual does not depend because
    parts of it cancel: their rounding errors are those of other rows.
    """
    whole, grads = expected
    if whole.shape != r.shape:
        return False
    if not is_finite(whole, grads):
        return True
    eps = torch.finfo(r.dtype).eps
    size = whole.norm() + sum(j.norm() * p.norm() for j, p in zip(rows, parameters, strict=True))
    if not bool((r - whole).norm() <= eps**0.5 * size):
        return False
    weights = random_weights(r.numel(), r)[:, None]
    weighted = [j.reshape(len(weights), -1) * weights for j in rows]
    sizes = torch.stack([j.norm(dim=1).sum() for j in weighted])
    offs = torch.stack([(j.sum(0) - grad.flatten()).norm() for j, grad in zip(weighted, grads, strict=True)])
    return bool((offs <= eps**0.5 * sizes + eps**0.75 * sizes.sum()).all())
