"""The rule for everything that has no rule of its own: torch.func differentiates the function along each direction.

Dimensions: N points, D chosen coordinates, S second derivatives, I features of any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor
from torch.func import jvp, vmap

from tengrad_triton.derivatives.exact import ExactDerivatives
from tengrad_triton.derivatives.jet import Jet

Pair = tuple[Tensor, Tensor]


def tensor_of(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return what the function returns, if that is a tensor.

    Raises:
        TypeError: it is something else.
    """
    with ExactDerivatives():
        result = function(v)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{type(function).__name__} returned {type(result).__name__}, but derivatives are carried through "
            "functions of one tensor that return one tensor; join it with what takes its output in one module"
        )
    return result


def general(function: Callable[[Tensor], Tensor], jet: Jet) -> Jet:
    """Carry a jet through any differentiable function of a batch: J t and tᵀ H t + J s for each direction t.

    All directions share one call of the function, so that what it draws at random is the same for each. The sum of all
    second derivatives has one s: every direction takes 1/D of it.

    Raises:
        TypeError: the function does not return a tensor.
    """
    value, first, second = (part.contiguous() for part in jet.over_points())  # duals of expanded tensors cannot be made
    value = value[0]

    def slope(v: Tensor, t: Tensor) -> Pair:
        return cast("Pair", jvp(lambda v: tensor_of(function, v), (v,), (t,)))

    def bend(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (y, first), (_, second) = cast("tuple[Pair, Pair]", jvp(slope, (value, t), (t, s)))
        return y, first, second

    if not len(second):
        y, first = vmap(slope, in_dims=(None, 0), randomness="same")(value, first)
        return Jet(y[:1], first, first[:0])
    only_sum = len(second) != len(first)
    if only_sum:
        second = (second / len(first)).repeat(len(first), *[1] * value.ndim)
    y, first, second = vmap(bend, randomness="same")(first, second)
    return Jet(y[:1], first, second.sum(0, keepdim=True) if only_sum else second)
