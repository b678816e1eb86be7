"""Capture under `torch.func`: each layer's input is recorded, and a perturbation of zero is added to its output.

The derivative with respect to the perturbation is the output gradient. This works under `torch.func` transforms and in
one compiled graph, where hooks on gradients do not work. A layer with uncalled linear layers gets one perturbation for
each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tengrad_triton.capture.record import LayerCall
from tengrad_triton.layers import (
    Call,
    Tap,
    arguments,
    first_tensor,
    forward_with_taps,
    has_uncalled,
    is_unrolled,
    mixes_samples,
    statistics_scale,
)

CallTensors = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""For each call of each layer, tensors by their places: perturbations of its outputs, output gradients, or the tensors
among its arguments."""


class FunctionalCapture:
    """Records the calls of layers and perturbs their outputs, during a forward between `start` and `stop`.

    Args:
        model: the module that will be called.
        layers: the layers to record, by name.
        samples_second: for each call of these layers, whether the second dimension counts the samples.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], samples_second: Mapping[str, Sequence[bool]]
    ) -> None:
        self._samples_second = samples_second
        self._hooked = {name: layer for name, layer in layers.items() if not has_uncalled(layer)}
        self._mixing = [module for module in model.modules() if mixes_samples(module)]
        tapped = {name: _TappedForward(self, name, layer) for name, layer in layers.items() if has_uncalled(layer)}
        others = {name: module for name, module in model.named_modules() if is_unrolled(module) and name not in tapped}
        self.tapped_names = frozenset(tapped)
        """The names of the layers whose perturbations belong to uncalled linear layers."""
        self._forwards = [*tapped.values(), *(_TappedForward(self, name, module) for name, module in others.items())]
        self._perturbations: CallTensors = {}
        self._tensors: dict[str, list[Mapping[str, Tensor]]] = {}
        self._other_arguments: dict[str, list[Any]] = {}  # for each recorded call: the rest of its arguments
        self.detach_statistics = False
        """Whether batch statistics are constants in the present forward."""

    def start(self, perturbations: CallTensors, detach_statistics: bool) -> None:
        """Begin a forward with these perturbations; ``detach_statistics`` makes batch statistics constants in it."""
        self._perturbations, self.detach_statistics = perturbations, detach_statistics
        self._tensors = {name: [] for name in perturbations}
        self._other_arguments = {name: [] for name in perturbations}

    def stop(self) -> dict[str, list[Mapping[str, Tensor]]]:
        """End the forward, and return the tensors among the arguments of each call."""
        tensors, self._tensors, self._perturbations, self.detach_statistics = self._tensors, {}, {}, False
        return tensors

    @contextmanager
    def attached(self, names: Collection[str], detaches: bool) -> Iterator[None]:
        """Prepare the model for tracing: attach hooks to the named layers, which will be recorded.

        With ``detaches``, also to those whose batch statistics become constants in some forward.
        """
        forwards = [forward for forward in self._forwards if forward.name in names or is_unrolled(forward.layer)]
        fast = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            # torch's fast path for evaluation has no derivative, and tracing does not see that one is needed.
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            if any(is_unrolled(forward.layer) for forward in forwards):
                stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))
            for forward in forwards:
                forward.layer.forward = forward
                stack.callback(delattr, forward.layer, "forward")
            for layer, hook in self._hooks(names, detaches).items():  # to run before the user's hooks
                stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    def _hooks(self, names: Collection[str], detaches: bool) -> dict[nn.Module, _HookChain]:
        """Return one hook for each layer, which first detaches its batch statistics, and then records its call."""
        mixing = self._mixing if detaches else []
        parts: dict[nn.Module, list[Callable[..., Any]]] = {layer: [_DetachStatistics(self)] for layer in mixing}
        for name, layer in self._hooked.items():
            if name in names:
                parts.setdefault(layer, []).append(_RecordCall(self, name))
        return {layer: _HookChain(hooks) for layer, hooks in parts.items()}

    # Methods for a traced forward

    def perturbations_of(self, name: str) -> Mapping[str, Tensor] | None:
        """Return the perturbations of a layer's present call, or None if the call is not recorded."""
        if name not in self._perturbations or not torch.is_grad_enabled():
            return None
        return self._perturbations[name][len(self._tensors[name])]

    def record(self, name: str, tensors: Mapping[str, Tensor], other_arguments: Any) -> None:
        """Record a layer's call: its tensors, and its other arguments."""
        self._tensors[name].append(tensors)
        self._other_arguments[name].append(other_arguments)

    # A method for after the forward

    def layer_calls(self, name: str, tensors: CallTensors, grads: CallTensors) -> list[LayerCall]:
        """Return the calls of a layer with their output gradients."""
        calls = []
        of_calls = (self._other_arguments[name], tensors[name], grads[name], self._samples_second[name])
        for (leaves, structure, outputs), own, by_place, second in zip(*of_calls, strict=True):
            args, kwargs = tree_unflatten([own.get(str(k), leaf) for k, leaf in enumerate(leaves)], structure)
            output_grads = [by_place.get(str(k)) for k in range(outputs or 1)]
            calls.append(LayerCall.with_grads(Call(args, kwargs), output_grads, not outputs, second))
        return calls


class _HookChain:
    """One forward hook that calls several in order: Dynamo of torch 2.11 confuses two hooks on one layer."""

    def __init__(self, hooks: Sequence[Callable[..., Any]]) -> None:
        self._hooks = tuple(hooks)

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        for hook in self._hooks:
            replaced = hook(layer, args, kwargs, y)
            y = y if replaced is None else replaced
        return y


class _RecordCall:
    """A hook that records a call of a layer and adds its perturbations."""

    def __init__(self, capture: FunctionalCapture, name: str) -> None:
        self._capture, self._name = capture, name

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        perturbations = self._capture.perturbations_of(self._name)
        if perturbations is None:
            return None
        leaves, structure = tree_flatten((args, kwargs))
        tensors = {str(k): leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs, output_structure = tree_flatten(y)
        places = [k for k, leaf in enumerate(outputs) if isinstance(leaf, Tensor)]
        self._capture.record(self._name, tensors, (others, structure, 0 if isinstance(y, Tensor) else len(places)))
        for index, place in enumerate(places):
            if str(index) in perturbations:
                outputs[place] = outputs[place] + perturbations[str(index)]
        return tree_unflatten(outputs, output_structure)


class _TappedForward:
    """Replaces the forward of a layer with uncalled linear layers by one that taps each of them."""

    def __init__(self, capture: FunctionalCapture, name: str, layer: Any) -> None:
        self._capture, self.name, self.layer = capture, name, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if first_tensor(args, kwargs).dim() != 3:  # the input has no batch dimension: torch's own forward handles it
            return type(self.layer).forward(self.layer, *args, **kwargs)
        perturbations = self._capture.perturbations_of(self.name)
        tap, weights = Tap(perturbations), dict(self.layer.named_parameters(remove_duplicate=False))
        outputs = forward_with_taps(self.layer, weights, arguments(self.layer, Call(args, kwargs)), tap)
        if perturbations is not None:
            self._capture.record(self.name, tap.inputs, None)
        return outputs


class _DetachStatistics:
    """A hook that makes a layer's batch statistics constants, if the present forward detaches them."""

    def __init__(self, capture: FunctionalCapture) -> None:
        self._capture = capture

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        if not self._capture.detach_statistics or not mixes_samples(layer):
            return None
        x = first_tensor(args, kwargs)
        scaled = x * statistics_scale(layer, x)
        return scaled + (y - scaled).detach()  # its value is y, and its derivative with respect to x is the scale
