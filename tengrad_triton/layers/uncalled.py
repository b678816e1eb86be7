"""Uncalled linear layers: attention and recurrent layers apply linear layers without calling a module.

No hook sees an uncalled linear layer. `forward_with_taps` therefore computes the whole layer step by step and passes
the input and the output of each uncalled linear layer to a `Tap`. Two callers need that:

- after a forward, `rerun_with_taps` repeats the call with the same random numbers, and autograd gives the derivatives
  with respect to the tapped outputs;
- in a compiled step the forward with taps replaces the layer's own, and the tap adds perturbations; the derivatives
  with respect to them are the output gradients.

Dimensions: C calls of an uncalled linear layer in one call of its parent, for example one for each time step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.layers.contribution import Call, Canonical, Inputs, arguments, first_tensor, tensors_in

Weights = Mapping[str, Tensor]
"""A layer's parameters, by their names within it."""
UncalledTensors = Mapping[str, Tensor]
"""For each uncalled linear layer, by its name: its inputs [C, …], or its output gradients [C, …]."""


class Tap:
    """Stores the inputs and outputs of uncalled linear layers, by name and in the order of their calls.

    Args:
        perturbations: tensors [C, …] to add to the outputs, by name; None adds nothing.
    """

    def __init__(self, perturbations: UncalledTensors | None = None) -> None:
        self._perturbations = {name: p.unbind() for name, p in (perturbations or {}).items()}
        self._inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Store one call, from input ``x`` to output ``y``; return ``y`` plus the perturbation of that call."""
        inputs = self._inputs.setdefault(name, [])
        if name in self._perturbations:
            y = y + self._perturbations[name][len(inputs)]
        inputs.append(x)
        self.outputs.setdefault(name, []).append(y)
        return y

    @property
    def inputs(self) -> UncalledTensors:
        """Return the inputs of all calls."""
        return _stack_calls(self._inputs)


class _DifferentiableTap(Tap):
    """A tap whose outputs require gradients and whose inputs are detached."""

    @override
    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return super().__call__(name, x.detach(), y if y.requires_grad else y.requires_grad_())


@singledispatch
def forward_with_taps(layer: nn.Module, weights: Weights, named_args: dict[str, Any], tap: Tap) -> Any:
    """Return what ``layer`` returns, with the output of every uncalled linear layer passed through ``tap``.

    Args:
        layer: an attention or recurrent layer.
        weights: used in place of the layer's own parameters.
        named_args: the arguments of the call, by their names in the layer's ``forward``.
        tap: called with the name, the input and the output of every uncalled linear layer.
    """
    raise TypeError(f"forward_with_taps expects a layer with uncalled linear layers, got {type(layer).__name__}")


@singledispatch
def canonical_from_uncalled(layer: nn.Module, inputs: UncalledTensors, grads: UncalledTensors) -> Canonical:
    """Return what one call of ``layer`` contributes to its parameters.

    Args:
        layer: an attention or recurrent layer.
        inputs: the inputs of its uncalled linear layers.
        grads: the output gradients of its uncalled linear layers.
    """
    raise TypeError(f"canonical_from_uncalled expects a layer with uncalled linear layers, got {type(layer).__name__}")


def canonical_of_call(layer: nn.Module, x: Any, grad_y: Any) -> Canonical:
    """Return what one call of a layer with uncalled linear layers contributes to its parameters.

    Outside of a compiled step, ``x`` and ``grad_y`` are the arguments of `canonical`, and the call is computed again. A
    compiled step has taps in its forward and passes two mappings, the arguments of `canonical_from_uncalled`.
    """
    has_tapped = not isinstance(x, (Tensor, Call))
    inputs, grads = (x, grad_y) if has_tapped else rerun_with_taps(layer, x, grad_y)
    return canonical_from_uncalled(layer, inputs, grads)


def rerun_with_taps(
    layer: nn.Module, x: Inputs, output_grads: list[Tensor | None]
) -> tuple[UncalledTensors, UncalledTensors]:
    """Repeat a call; return the inputs and the output gradients of its uncalled linear layers.

    ``output_grads`` are the derivatives with respect to the tensors that the call returned; None where there is none.
    """
    call, tap = x if isinstance(x, Call) else Call((x,)), _DifferentiableTap()
    like = first_tensor(call.args, call.kwargs)
    weights = {name: p.detach().to(like) for name, p in layer.named_parameters()}
    with replay_rng(call.rng, like.device), torch.enable_grad():
        outputs = forward_with_taps(layer, weights, arguments(layer, call), tap)
    pairs = zip(tensors_in(outputs), output_grads, strict=True)
    ys, cotangents = zip(*((y, g) for y, g in pairs if g is not None), strict=True)
    tapped = [y for calls in tap.outputs.values() for y in calls]
    grads = iter(torch.autograd.grad(ys, tapped, cotangents, allow_unused=True, materialize_grads=True))
    return tap.inputs, _stack_calls({name: [next(grads) for _ in calls] for name, calls in tap.outputs.items()})


def _stack_calls(calls: Mapping[str, list[Tensor]]) -> UncalledTensors:
    return {name: xs[0][None] if len(xs) == 1 else torch.stack(xs) for name, xs in calls.items()}


def rng_state(device: torch.device) -> Tensor:
    """Return the state of the random number generator that layers on ``device`` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replay_rng(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Set the generator of ``device`` to ``state``, and restore it when the context ends; None changes nothing."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
