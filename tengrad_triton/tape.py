"""Capture without autograd's tape: each layer's input is noted, and a zero tensor is added to its output.

The derivative by that zero, the perturbation, is the derivative by the output. This works under `torch.func` transforms
and in one compiled graph, where hooks on gradients do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tengrad_triton.layers import frozen_scale, input_of, mixes_samples

Perturbations = Mapping[str, Sequence[Tensor]]


class Tape:
    """Reads the perturbations of the layers named, and notes their inputs, while it runs."""

    def __init__(self, layers: Mapping[str, nn.Module], mixing: Sequence[nn.Module] = ()) -> None:
        self._layers, self._mixing = layers, mixing
        self._perturbations: Perturbations = {}
        self._constants = False
        self.inputs: dict[str, list[Tensor]] = {}

    def start(self, perturbations: Perturbations, constants: bool = False) -> None:
        """Begin a forward with these perturbations: for each layer one for each of its calls.

        ``constants`` has the statistics of layers that mix samples pass for constants.
        """
        self._perturbations, self._constants = perturbations, constants
        self.inputs = {name: [] for name in perturbations}

    def stop(self) -> dict[str, list[Tensor]]:
        """End it and return every layer's inputs, call by call."""
        inputs, self.inputs, self._perturbations, self._constants = self.inputs, {}, {}, False
        return inputs

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put the hooks on the layers, for the time in which the graph may be traced."""
        handles = [layer.register_forward_hook(_ConstantCall(self), with_kwargs=True) for layer in self._mixing]
        handles += [
            layer.register_forward_hook(_PerturbedCall(self, name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def constants(self) -> bool:
        """Whether statistics of batches are constants in this forward."""
        return self._constants

    def perturbed(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Note one call of a layer and return its perturbed output."""
        self.inputs[name].append(x)
        return y + self._perturbations[name][len(self.inputs[name]) - 1]


class _PerturbedCall:
    def __init__(self, tape: Tape, name: str) -> None:
        self._tape, self._name = tape, name

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        return self._tape.perturbed(self._name, x, y)


class _ConstantCall:
    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        if not self._tape.constants or not mixes_samples(layer):
            return None
        x = input_of(args, kwargs)
        scaled = x * frozen_scale(layer, x)
        return scaled + (y - scaled).detach()  # y itself, with the scale for its derivative
