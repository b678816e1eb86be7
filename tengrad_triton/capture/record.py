"""What was seen of one forward: every call of every layer, and the derivatives that came back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from tengrad_triton.layers import Call


@dataclass
class LayerCall:
    """One call of a layer: its arguments, where its outputs stand in the graph, and what came back to each.

    Attributes:
        call: the arguments, detached.
        edges: one for each tensor that the layer returned; None where there is no gradient, or after it came.
        returns_tensor: whether the layer returned one tensor, and nothing around it.
        output_shape: of the first tensor that the layer returned.
        samples_second: whether the samples are the second dimension where the layer's rule expects the first.
    """

    call: Call
    edges: list[GradientEdge | None]
    returns_tensor: bool
    samples_second: bool = False
    output_shape: tuple[int, ...] = ()
    output_grads: list[Tensor | None] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output_grads = self.output_grads or [None] * len(self.edges)
        self.versions = self.versions or self._versions()

    def _versions(self) -> list[int]:
        # A graph is made of functions: nothing in it is written into.
        return [] if torch.compiler.is_compiling() else [tensor._version for tensor in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.call.args, self.call.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def has_grads(self) -> bool:
        """Whether any derivative came back."""
        return any(grad is not None for grad in self.output_grads)

    def again(self) -> LayerCall:
        """Return the same call for derivatives of further rows."""
        return LayerCall(
            self.call, [None] * len(self.edges), self.returns_tensor, self.samples_second, versions=self.versions
        )

    def inputs(self, name: str) -> Tensor | Call:
        """Return the input, or the whole call of several tensors, unless something wrote into it since the forward."""
        if self._versions() != self.versions:
            raise RuntimeError(
                f"the input of layer {name!r} was modified in place between its forward and optimizer.step(); "
                "step first, or give the model a copy"
            )
        if len(self.tensors) > 1 or self.call.rng is not None:
            return self.call
        return self.tensors[0].transpose(0, 1) if self.samples_second else self.tensors[0]

    def scaled_grads(self, scale: int = 1) -> Tensor | list[Tensor | None]:
        """Return the derivative by the output, or by each of several outputs, times ``scale``."""
        grads = (
            self.output_grads if scale == 1 else [None if grad is None else scale * grad for grad in self.output_grads]
        )
        if not self.returns_tensor or grads[0] is None:
            return grads
        return grads[0].transpose(0, 1) if self.samples_second else grads[0]


@dataclass
class Record:
    """One forward of the model: the number of samples, and every use of every layer in it.

    Attributes:
        samples: how many there are; −1 until known.
        call: the arguments of the model, detached.
        calls: by the layer's name.
        layers_with_grads: the layers whose uses have become rows.
        unbatched: why a layer's calls describe no rows, by the layer's name.
        unattributed: why a parameter's uses are not all in calls of its layers, by the parameter's id.
        per_sample_grads: a parameter's rows [N, …] that were found without any rule, by its id.
        gradient_sums: a parameter's gradient for the sum of all rows, to compare with, by its id.
        backward_seen: whether a backward has reached it.
        paused: whether derivatives that pass by at present are none of the loss's.
        used_backward_per_sample: whether some rows took a backward pass a sample.
        mixes_samples: whether a layer's output for one sample depended on the others.
        extra_draws: the same forward with the derivatives of further rows of each sample.
    """

    samples: int
    call: Call = field(default_factory=lambda: Call(()))
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    layers_with_grads: set[str] = field(default_factory=set)
    unbatched: dict[str, str] = field(default_factory=dict)
    unattributed: dict[int, str] = field(default_factory=dict)
    per_sample_grads: dict[int, Tensor] = field(default_factory=dict)
    gradient_sums: dict[int, Tensor] = field(default_factory=dict)
    backward_seen: bool = False
    paused: bool = False
    mixes_samples: bool = False
    used_backward_per_sample: bool = False
    extra_draws: list[Record] = field(default_factory=list)

    def all_calls(self) -> list[LayerCall]:
        """Return the calls of all layers, in one order."""
        return [use for uses in self.calls.values() for use in uses]

    def again(self) -> Record:
        """Return the same forward, to be filled with the derivatives of further rows."""
        uses = {name: [use.again() for use in calls] for name, calls in self.calls.items()}
        return Record(
            self.samples,
            self.call,
            uses,
            unbatched=self.unbatched,
            unattributed=self.unattributed,
            mixes_samples=self.mixes_samples,
        )

    def clear(self) -> None:
        """Forget everything: the graph of an output that is still around holds the record itself."""
        self.call = Call(())
        for held in (self.calls, self.extra_draws, self.per_sample_grads, self.gradient_sums):
            held.clear()


def listen(record: Record) -> None:
    """Have the backward of the loss leave the derivatives by the layers' outputs in the record."""

    def keep(use: LayerCall, place: int, index: int) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            grad = grads[index]
            if grad is not None and not record.paused:
                # The very tensor, not a detached one: autograd lends a gradient on only while nobody else holds it.
                own = grad.detach() if grad.requires_grad else grad
                before = use.output_grads[place]
                use.output_grads[place] = own if before is None else before + own

        return hook

    for use in record.all_calls():
        for place, edge in enumerate(use.edges):
            if edge is not None:
                edge.node.register_prehook(keep(use, place, edge.output_nr))
        use.edges = [None] * len(use.edges)
