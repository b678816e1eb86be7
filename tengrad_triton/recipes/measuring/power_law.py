"""The exponent of a power law, by least squares."""

import math
from collections.abc import Sequence


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Return e of the power law costs ∝ values^e: the slope of the least-squares line through the logarithms."""
    x, y = [math.log(v) for v in values], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
