"""Which rule carries a jet through a module: that of its very type, or the general one.

Dimensions: N points, D chosen coordinates, S second derivatives, P = 1 + D + S positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tengrad_triton.derivatives.activations import ACTIVATIONS, Slopes
from tengrad_triton.derivatives.general import general
from tengrad_triton.derivatives.jet import Jet

Rule = Callable[[Any, Jet], Jet]
"""From a module and the jet of its input to the jet of its output."""


def through(function: Callable[[Tensor], Tensor], jet: Jet) -> Jet:
    """Carry a jet through a module or another function of a batch, by the rule of its type if that is known.

    A type's rule is not that of its subclasses, which may compute something else. A module with forward hooks, or
    with a forward of its own, goes the general way.
    """
    if not isinstance(function, nn.Module) or is_changed(function):
        return general(function, jet)
    kind = type(function)
    if parametrize.is_parametrized(function):  # its class is a subclass that computes what the rule reads
        kind = kind.__bases__[0]
    if kind in ACTIVATIONS:
        return through_activation(ACTIVATIONS[kind](function, jet.value), jet)
    return RULES.get(kind, general)(function, jet)


def is_changed(module: nn.Module) -> bool:
    """Return whether calling the module may do something else than the forward of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def through_activation(slopes: Slopes, jet: Jet) -> Jet:
    """Apply the chain rule to single entries: ∂f = f' ∂z and ∂²f = f' ∂²z + f'' (∂z)²."""
    value, slope, bend = slopes
    first, second = slope * jet.first, slope * jet.second
    if bend is not None and len(jet.second):
        square = jet.first.square()
        if len(jet.second) != len(jet.first):
            square = square.sum(0, keepdim=True)
        second = torch.addcmul(second, bend, square)
    return Jet(value, first, second)


def linear(layer: nn.Linear, jet: Jet) -> Jet:
    """The weight acts on every position, the bias on the value only.

    At one point, as under `torch.func.vmap` over the points, one product takes all positions: the gradient of the
    weight is then one product too, not a sum of matrices at each point. At many points the copy that joins them costs
    more than it saves.
    """
    if jet.value.shape[1] != 1:
        return Jet(F.linear(jet.value, layer.weight, layer.bias), *(F.linear(part, layer.weight) for part in jet[1:]))
    value, first, second = F.linear(torch.cat(jet), layer.weight).split([len(part) for part in jet])
    return Jet(value if layer.bias is None else value + layer.bias, first, second)


def sequential(layer: nn.Sequential, jet: Jet) -> Jet:
    """One module after another."""
    for part in layer:
        jet = through(part, jet)
    return jet


def identity(layer: nn.Module, jet: Jet) -> Jet:
    """The jet as it came."""
    return jet


def dropout(layer: nn.Dropout, jet: Jet) -> Jet:
    """The jet as it came, unless entries are dropped."""
    return general(layer, jet) if layer.training and layer.p else jet


def flatten(layer: nn.Flatten, jet: Jet) -> Jet:
    """Join features; a position is a dimension before the points."""
    start, end = layer.start_dim, layer.end_dim
    if start == 0 or -start >= jet.value.ndim - 1:  # the points are among what is joined
        return general(layer, jet)
    start, end = start + (start > 0), end + (end > 0)
    return Jet(*(part.flatten(start, end) for part in jet))


def unflatten(layer: nn.Unflatten, jet: Jet) -> Jet:
    """Give features another shape; a position is a dimension before the points."""
    dim = layer.dim
    if not isinstance(dim, int) or dim == 0 or -dim >= jet.value.ndim - 1:
        return general(layer, jet)
    return Jet(*(part.unflatten(dim + (dim > 0), layer.unflattened_size) for part in jet))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear, nn.Sequential: sequential, nn.Identity: identity, nn.Dropout: dropout, nn.Flatten: flatten,
    nn.Unflatten: unflatten,
}  # fmt: skip
"""The rules of modules that do not act on single entries."""
