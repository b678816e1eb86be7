"""How many times the likelihood's own derivative a derivative is, row by row, with bounds from the rounding.

Dimensions: S rows, each a regression of its own; K points of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDINGS = 4  # of a result: twice what softmax, its logarithm, the product and the mean make at worst
_REST = 1e-3  # 1 − leverage, below which one point makes the line, whatever the rounding of the leverage
_LOG_ODDS = math.log(1e-6)  # how likely rows of another kind may lie on lines by chance


@dataclass(frozen=True)
class Lines:
    """The line through each row's points.

    Attributes:
        slope: by what the derivative is multiplied [S].
        bound: how far rounding, or one point that belongs to something else, could move the slope [S]; inf where the
            points say nothing.
        fits: whether all points lie on the line, up to rounding [S].
        log_odds: the logarithm of how likely this is for points that belong to no line [S].
    """

    slope: Tensor
    bound: Tensor
    fits: Tensor
    log_odds: Tensor


def rounding(*tensors: Tensor) -> float:
    """Return the bound on the relative error of a derivative, from the shortest of the dtypes."""
    return _ROUNDINGS * max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def underflow(samples: int, *tensors: Tensor) -> float:
    """Return the bound on the absolute error of a derivative that was divided by the samples before it was rounded."""
    limits = [torch.finfo(tensor.dtype) for tensor in tensors]
    return _ROUNDINGS * samples * max(limit.smallest_normal * limit.eps for limit in limits)


def through_zero(x_SK: Tensor, h_SK: Tensor, tolerance_SK: Tensor) -> Lines:
    """Return the lines h = slope · x, if x belongs to the loss for certain."""
    square_S, size_S = x_SK.square().sum(1), h_SK.abs().sum(1)
    slope_S = _quotient((x_SK * h_SK).sum(1), square_S, 0.0)
    bound_S = _quotient((x_SK.abs() * tolerance_SK).sum(1), square_S, torch.inf)
    moved_SK = torch.where(square_S > 0, bound_S, 0.0)[:, None] * x_SK.abs()
    fits_SK = (h_SK - slope_S[:, None] * x_SK).abs() <= tolerance_SK + moved_SK
    # Each point would lie within its tolerance of the line by chance, with the tolerance over the points' range.
    log_odds_S = _quotient(2 * tolerance_SK.sum(1), size_S, 1.0).clamp(1e-30, 1).log()
    return Lines(slope_S, bound_S, fits_SK.all(1), log_odds_S * x_SK.shape[1])


def through_points(x_SK: Tensor, h_SK: Tensor, tolerance_SK: Tensor, mask_SK: Tensor, intercept: bool) -> Lines:
    """Return the lines h = slope · x + constant, or without a constant, through the points that ``mask_SK`` keeps.

    What the targets are is unknown, and any one of the points may be moved by them. A point with leverage l that is off
    by Δ leaves a residual of (1 − l) Δ, so the bound on the slope is 1 / (1 − l) times that from rounding.
    """
    count_S1 = mask_SK.sum(1, keepdim=True).clamp(min=1)
    x_SK, h_SK, tolerance_SK = (value.where(mask_SK, 0.0) for value in (x_SK, h_SK, tolerance_SK))
    centered_SK = (x_SK - x_SK.sum(1, keepdim=True) / count_S1).where(mask_SK, 0.0)
    u_SK, v_SK = x_SK, h_SK
    if intercept:
        u_SK, v_SK = centered_SK, (h_SK - h_SK.sum(1, keepdim=True) / count_S1).where(mask_SK, 0.0)
        tolerance_SK = tolerance_SK + tolerance_SK.sum(1, keepdim=True) / count_S1
    lines = through_zero(u_SK, v_SK, tolerance_SK)
    leverage_S = _quotient(u_SK.square().amax(1), u_SK.square().sum(1), 1.0)
    leverage_S = leverage_S + (1 / count_S1[:, 0] if intercept else 0)
    # A line without a constant must also differ from one of slope 1 with a constant, which is label smoothing.
    bound_S = _quotient((centered_SK.abs() * tolerance_SK).sum(1), centered_SK.square().sum(1), torch.inf)
    rest_S = (1 - leverage_S).where(leverage_S < 1 - _REST, 0.0)
    bound_S = _quotient(torch.maximum(bound_S, lines.bound), rest_S, torch.inf)
    spare_S = (count_S1[:, 0] - (2 if intercept else 1)).clamp(min=0)
    return Lines(lines.slope, bound_S, lines.fits, lines.log_odds / x_SK.shape[1] * spare_S)


@dataclass(frozen=True)
class Factors:
    """The smallest and the largest factor that were seen; ``constant`` where all rows have the same, up to rounding."""

    low: float
    high: float
    constant: bool


def factors(lines: Lines) -> Factors | None:
    """Return the factors of the rows.

    None says that there is nothing to say: most rows are on no line, or none has a slope other than 1, or those that
    have may lie on lines by chance.
    """
    off_S = lines.fits & ((lines.slope - 1).abs() > lines.bound)
    rows, off = len(off_S), int(off_S.sum())
    log_odds = float(lines.log_odds[off_S].sum()) + off * math.log(rows)  # those that are on a line may be any
    if 2 * int(lines.fits.sum()) < rows or not off or log_odds > _LOG_ODDS:
        return None
    slope, bound = lines.slope[off_S], lines.bound[off_S]
    sure = bound <= (slope - 1).abs().clamp(min=0.1) / 2
    seen = slope[sure if bool(sure.any()) else bound == bound.min()]
    low, high = float(seen.min()), float(seen.max())
    best = float(slope[bound.argmin()])
    same = bool((slope - bound).max() <= (slope + bound).min()) and high - low <= 0.1 * abs(best)
    return Factors(best, best, True) if same and 2 * off > rows else Factors(low, high, False)


def _quotient(numerator: Tensor, denominator: Tensor, otherwise: float) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, otherwise)
