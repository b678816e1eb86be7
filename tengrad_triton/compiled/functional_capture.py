"""Capture without autograd's tape: each layer's input is noted, and a zero tensor is added to its output.

The derivative by that zero is the derivative by the output. This works under `torch.func` transforms and in one
compiled graph, where hooks on gradients do not. Layers that use others without calling them have it done at each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    forward_with_taps,
    statistics_scale,
    has_uncalled,
    first_tensor,
    is_unrolled,
    mixes_samples,
)

Calls = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""By layer, for each of its calls: zeros by the place where they are added, derivatives by them, or what was seen."""


class FunctionalCapture:
    """Notes the calls of layers and adds zeros to their outputs, while it runs.

    Args:
        model: the module that will be called.
        layers: those that zeros will be added to, by name.
        swapped: for each call of theirs, whether the samples are the second dimension.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], swapped: Mapping[str, Sequence[bool]]
    ) -> None:
        self._swapped = swapped
        self._noted = {name: layer for name, layer in layers.items() if not has_uncalled(layer)}
        self._mixing = [module for module in model.modules() if mixes_samples(module)]
        within = {name: _Within(self, name, layer) for name, layer in layers.items() if has_uncalled(layer)}
        others = {name: module for name, module in model.named_modules() if is_unrolled(module) and name not in within}
        self.within = frozenset(within)
        """The names of the layers whose zeros and notes are those of others within."""
        self._stand_ins = [*within.values(), *(_Within(self, name, module) for name, module in others.items())]
        self._zeros: Calls = {}
        self._seen: dict[str, list[Mapping[str, Tensor]]] = {}
        self._arguments: dict[str, list[Any]] = {}  # of every noted call, without its tensors
        self.constants = False
        """Whether statistics of batches are constants in this forward."""

    def start(self, zeros: Calls, constants: bool = False) -> None:
        """Begin a forward with these zeros.

        ``constants`` has the statistics of layers that mix samples pass for constants.
        """
        self._zeros, self.constants = zeros, constants
        self._seen, self._arguments = {name: [] for name in zeros}, {name: [] for name in zeros}

    def stop(self) -> dict[str, list[Mapping[str, Tensor]]]:
        """End it and return the tensors that every call got."""
        seen, self._seen, self._zeros, self.constants = self._seen, {}, {}, False
        return seen

    @contextmanager
    def standing(self, noting: bool) -> Iterator[None]:
        """Have the model be as a graph needs it, while that may be traced; with ``noting``, listen to every layer."""
        within = [one for one in self._stand_ins if noting or is_unrolled(one.layer)]
        fast = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            # torch's shortcut for evaluation has no derivative, and a trace does not tell that one is wanted.
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            if any(is_unrolled(one.layer) for one in within):
                stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))
            for one in within:
                one.layer.forward = one
                stack.callback(delattr, one.layer, "forward")
            hooks: list[tuple[nn.Module, Any]] = [(layer, _Noted(self, name)) for name, layer in self._noted.items()]
            hooks += [(layer, _Constant(self)) for layer in self._mixing]
            for layer, hook in hooks if noting else []:  # in front of everyone else's
                stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    # What a traced forward calls

    def zeros_of(self, name: str) -> Mapping[str, Tensor] | None:
        """Return the zeros of the call of a layer that is going on; None where it is not to be noted."""
        if name not in self._zeros or not torch.is_grad_enabled():
            return None
        return self._zeros[name][len(self._seen[name])]

    def note(self, name: str, seen: Mapping[str, Tensor], rest: Any = None) -> None:
        """Note a call: its tensors, and whatever else it got."""
        self._seen[name].append(seen)
        self._arguments[name].append(rest)

    # What was found

    def uses(self, name: str, seen: Calls, grads: Calls) -> list[LayerCall]:
        """Return the calls of a layer with the derivatives by its outputs."""
        uses = []
        for rest, tensors, by, swapped in zip(
            self._arguments[name], seen[name], grads[name], self._swapped[name], strict=True
        ):
            leaves, structure, outputs = rest
            args, kwargs = tree_unflatten([tensors.get(str(k), leaf) for k, leaf in enumerate(leaves)], structure)
            of_outputs = [by.get(str(k)) for k in range(outputs or 1)]
            uses.append(LayerCall.with_grads(Call(args, kwargs), of_outputs, not outputs, swapped))
        return uses


class _Noted:
    """A hook that notes a call of a layer and adds its zeros."""

    def __init__(self, tape: FunctionalCapture, name: str) -> None:
        self._tape, self._name = tape, name

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        zeros = self._tape.zeros_of(self._name)
        if zeros is None:
            return None
        leaves, structure = tree_flatten((args, kwargs))
        tensors = {str(k): leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ys, form = tree_flatten(y)
        places = [k for k, leaf in enumerate(ys) if isinstance(leaf, Tensor)]
        self._tape.note(self._name, tensors, (others, structure, 0 if isinstance(y, Tensor) else len(places)))
        for index, place in enumerate(places):
            if str(index) in zeros:
                ys[place] = ys[place] + zeros[str(index)]
        return tree_unflatten(ys, form)


class _Within:
    """Stands for the forward of a layer that uses others without calling them."""

    def __init__(self, tape: FunctionalCapture, name: str, layer: Any) -> None:
        self._tape, self._name, self.layer = tape, name, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if first_tensor(args, kwargs).dim() != 3:  # no batch
            return type(self.layer).forward(self.layer, *args, **kwargs)
        zeros, weights = self._tape.zeros_of(self._name), dict(self.layer.named_parameters(remove_duplicate=False))
        tap = Tap(zeros)
        outputs = forward_with_taps(self.layer, weights, arguments(self.layer, Call(args, kwargs)), tap)
        if zeros is not None:
            self._tape.note(self._name, tap.inputs)
        return outputs


class _Constant:
    """A hook that has a layer's statistics pass for constants, while the tape says so."""

    def __init__(self, tape: FunctionalCapture) -> None:
        self._tape = tape

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        if not self._tape.constants or not mixes_samples(layer):
            return None
        x = first_tensor(args, kwargs)
        scaled = x * statistics_scale(layer, x)
        return scaled + (y - scaled).detach()  # y itself, with the scale for its derivative
