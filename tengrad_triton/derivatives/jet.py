"""The jet: a batch of values together with its derivatives with respect to the coordinates of the points.

Dimensions: N points, D chosen coordinates, S second derivatives (D; 1 for only their sum; 0 for none), I features of
any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Jet(NamedTuple):
    """What is carried through the layers, positions first.

    The derivatives may have 1 in place of N, where they are the same at all points: they broadcast with the value.

    Attributes:
        value: the values v, [1, N, I].
        first: the first derivatives ∂v/∂x_d, [D, N, I].
        second: the second derivatives ∂²v/∂x_d², [D, N, I]; their sum over d, [1, N, I]; or none, [0, N, I].
    """

    value: Tensor
    first: Tensor
    second: Tensor

    def over_points(self) -> Jet:
        """Return the same jet with derivatives that have N points too."""
        shape = self.value.shape[1:]
        return Jet(self.value, self.first.expand(len(self.first), *shape), self.second.expand(len(self.second), *shape))


def jet_of(x_ND: Tensor, coordinates: Sequence[int], seconds: int) -> Jet:
    """Return the jet of the points themselves: first derivatives 0 and 1, and S = ``seconds`` second derivatives 0."""
    first = torch.eye(x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)[list(coordinates)][:, None]
    return Jet(x_ND[None], first, first.new_zeros(seconds, 1, x_ND.shape[1]))
