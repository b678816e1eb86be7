"""Layers that use linear layers without calling them: attention and recurrent ones, redone with a tap at each.

A tap stands behind a linear layer within. It notes what that layer saw; the derivative by what it returned is found by
doing the whole layer once more with the same random numbers, or, in a compiled graph, in the forward itself.

Dimensions: C calls of a linear layer within.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tengrad_triton.layers.contribution import Call, Canonical, Inputs, arguments, input_of

Weights = Mapping[str, Tensor]
Stacked = Mapping[str, Tensor]
"""What linear layers within saw, or the derivatives by what they returned, [C, …], by their names."""


class Tap:
    """Notes what linear layers saw and returned, call by call, by their names; adds zeros [C, …] where it has any."""

    def __init__(self, zeros: Stacked | None = None) -> None:
        self._zeros = {name: z.unbind() for name, z in (zeros or {}).items()}
        self._seen: dict[str, list[Tensor]] = {}
        self.returned: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y``, with its zero."""
        calls = self._seen.setdefault(name, [])
        if name in self._zeros:
            y = y + self._zeros[name][len(calls)]
        calls.append(x)
        self.returned.setdefault(name, []).append(y)
        return y

    @property
    def seen(self) -> Stacked:
        """Return all inputs."""
        return stacked(self._seen)


class _Leaves(Tap):
    """Begins the graph at what linear layers return."""

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return super().__call__(name, x.detach(), y if y.requires_grad else y.requires_grad_())


@singledispatch
def forward_with_taps(layer: nn.Module, weights: Weights, named: dict[str, Any], tap: Tap) -> Any:
    """Return what ``layer`` returns, with these weights and arguments, from linear layers that each end in the tap."""
    raise TypeError(f"{type(layer).__name__} is no layer with others within that it does not call")


@singledispatch
def rows_within(layer: nn.Module, seen: Stacked, by: Stacked) -> Canonical:
    """Return the canonical form from what the linear layers within saw and the derivatives by what they returned."""
    raise TypeError(f"{type(layer).__name__} is no layer with others within that it does not call")


def of_call(layer: nn.Module, x: Any, grad_y: Any) -> Canonical:
    """Return the canonical form of a call, or of what a tap has already found: inputs and derivatives, `Stacked`."""
    seen, by = redone(layer, x, grad_y) if isinstance(x, (Tensor, Call)) else (x, grad_y)
    return rows_within(layer, seen, by)


def redone(layer: nn.Module, x: Inputs, grads: list[Tensor | None]) -> tuple[Stacked, Stacked]:
    """Do a call once more; return what its linear layers saw, and the derivatives by what they returned."""
    call, tap = x if isinstance(x, Call) else Call((x,)), _Leaves()
    like = input_of(call.args, call.kwargs)
    weights = {name: p.detach().to(like) for name, p in layer.named_parameters()}
    with replayed(call.rng, like.device), torch.enable_grad():
        outputs = forward_with_taps(layer, weights, arguments(layer, call), tap)
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    ys, cotangents = zip(*((y, g) for y, g in zip(leaves, grads, strict=True) if g is not None), strict=True)
    returned = [y for calls in tap.returned.values() for y in calls]
    by = iter(torch.autograd.grad(ys, returned, cotangents, allow_unused=True, materialize_grads=True))
    return tap.seen, stacked({name: [next(by) for _ in calls] for name, calls in tap.returned.items()})


def stacked(calls: Mapping[str, list[Tensor]]) -> Stacked:
    """Return the calls of each linear layer as one tensor."""
    return {name: xs[0][None] if len(xs) == 1 else torch.stack(xs) for name, xs in calls.items()}


def rng_state(device: torch.device) -> Tensor:
    """Return the state of the generator that layers on a device draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Have the generator draw from ``state`` on, and go on afterwards as if nothing had happened."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
