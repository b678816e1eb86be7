"""Derivatives of a network with respect to its inputs.

Key: N points, D coordinates, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap


class Derivatives(NamedTuple):
    """The value [N, O] of a function, and its first and second derivative [N, D, O] by each coordinate."""

    value: Tensor
    first: Tensor
    second: Tensor


def derivatives(u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None) -> Derivatives:
    """Return u, ∂u/∂x_d and ∂²u/∂x_d², for all or some coordinates, by forward mode twice."""

    def along(direction_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def first(x: Tensor) -> Any:
            return jvp(u, (x,), (direction_ND,))

        both: Any = jvp(first, (x_ND,), (direction_ND,))
        (value_NO, first_NO), (_, second_NO) = both
        return value_NO, first_NO, second_NO

    chosen = list(range(x_ND.shape[-1])) if coordinates is None else list(coordinates)
    unit_DND = torch.eye(x_ND.shape[-1], dtype=x_ND.dtype)[chosen, None, :].expand(-1, len(x_ND), -1)
    value_DNO, first_DNO, second_DNO = vmap(along)(unit_DND)
    return Derivatives(value_DNO[0], first_DNO.movedim(0, 1), second_DNO.movedim(0, 1))


def laplacian(u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None) -> Tensor:
    """Return Σ_d ∂²u/∂x_d² [N, O], over all or some coordinates."""
    return derivatives(u, x_ND, coordinates).second.sum(1)
