"""The record of one forward: every call of every layer, and its output gradients."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import Call, tensors_in


@dataclass
class LayerCall:
    """One call of a layer.

    Attributes:
        call: the arguments, detached from the graph.
        edges: for each tensor that it returned, the tensor's edge in the graph; None if the tensor is not in the graph,
            or if its derivative is already known.
        returns_tensor: whether it returned a tensor, rather than a tuple or another structure.
        samples_second: whether the samples are in the second dimension although the layer's rule expects the first.
        output_shape: the shape of the first tensor that it returned; empty if it is not known.
        output_grads: for each tensor that it returned, the derivative of each sample's own loss with respect to it;
            None if there is none, or none yet. For the empirical Fisher it is the derivative of the caller's loss,
            which `scaled_grads` makes that of the own losses.
        versions: the version counters of its input tensors at the time of the call. Compiled code has none.
    """

    call: Call
    edges: list[GradientEdge | None]
    returns_tensor: bool
    samples_second: bool
    output_shape: tuple[int, ...]
    output_grads: list[Tensor | None]
    versions: list[int]

    @classmethod
    def of_forward(cls, call: Call, returned: Any) -> LayerCall:
        """Return a call without output gradients, which a later backward pass will add."""
        outputs = tensors_in(returned)
        edges = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        no_grads: list[Tensor | None] = [None] * len(outputs)
        is_tensor, shape = isinstance(returned, Tensor), tuple(outputs[0].shape)
        return cls(call, edges, is_tensor, False, shape, no_grads, _versions(call))

    @classmethod
    def with_grads(
        cls, call: Call, output_grads: list[Tensor | None], returns_tensor: bool, samples_second: bool
    ) -> LayerCall:
        """Return a call whose output gradients are known, so that it needs no edges."""
        no_edges: list[GradientEdge | None] = [None] * len(output_grads)
        return cls(call, no_edges, returns_tensor, samples_second, (), output_grads, _versions(call))

    def without_grads(self) -> LayerCall:
        """Return the same call without its output gradients."""
        return replace(self, edges=list(self.edges), output_grads=[None] * len(self.output_grads))

    @property
    def has_grads(self) -> bool:
        """Whether any output gradient is known."""
        return any(grad is not None for grad in self.output_grads)

    def inputs(self, name: str) -> Tensor | Call:
        """Return the input for the layer's rule: a tensor, or the whole call if the layer takes several tensors.

        Raises:
            RuntimeError: a tensor was modified in place since the call. The error names the layer as ``name``.
        """
        if _versions(self.call) != self.versions:
            raise RuntimeError(
                f"the input of layer {name!r} was modified in place between its forward and optimizer.step(): "
                "call optimizer.step() first, or give the model a copy of the input"
            )
        tensors = tensors_in((self.call.args, self.call.kwargs))
        if len(tensors) > 1 or self.call.rng is not None:
            return self.call
        return self._samples_first(tensors[0])

    def scaled_grads(self, scale: float) -> Tensor | list[Tensor | None]:
        """Return the output gradients times ``scale`` as the layer's rule expects them: one tensor, or a list."""
        grads = self.output_grads
        if scale != 1:
            # In half precision the product would be rounded.
            grads = [None if grad is None else scale * widen(grad) for grad in grads]
        if not self.returns_tensor or grads[0] is None:
            return grads
        return self._samples_first(grads[0])

    def _samples_first(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.samples_second else x


def _versions(call: Call) -> list[int]:
    if torch.compiler.is_compiling():  # a compiled graph changes no input in place and has no versions
        return []
    return [tensor._version for tensor in tensors_in((call.args, call.kwargs))]


@dataclass
class Findings:
    """What was found out about the forwards of one structure.

    Attributes:
        refuted: for each parameter whose rows autograd contradicted, by id, the reason.
        only_by_graph: for each parameter whose rows running the model again does not give, by id, the reason.
        refreshes: in how many refreshes there were such forwards.
        last: the number of the last of these refreshes.
        all_through_output: whether the gradient of the caller's loss reached the parameters through the model's output
            only; None before a backward has shown it.
    """

    refuted: dict[int, str] = field(default_factory=dict)
    only_by_graph: dict[int, str] = field(default_factory=dict)
    refreshes: int = 0
    last: int = -1
    all_through_output: bool | None = None


@dataclass(eq=False)
class Record:
    """One forward of the model: every call of every layer, and the output gradients for one row of each sample.

    Attributes:
        call: the arguments of the model, detached from the graph.
        samples: N; 0 until the forward ends.
        pick: returns, from what the model returned, the tensors at which the backward passes for rows start.
        calls: the calls of each layer, by the layer's name.
        findings: what was found out about forwards of the same structure.
        proves: whether the rows of this forward are compared with autograd.
        layers_with_grads: the names of the layers that had output gradients for at least one call, for messages;
            `contributions.gather` fills it.
        unbatched: for each layer whose calls do not have one entry for each sample, by name, the reason.
        unattributed: for each parameter whose rows do not follow from calls of its layers, by id, the reason.
        unused: the ids of the parameters that the graph of the output does not reach: their rows are zero.
        per_sample_grads: the rows [N, …] of parameters without a rule, by the parameter's id.
        gradient_sums: for each such parameter, by id, the sum of its rows over the samples, as autograd computes it.
        backward_seen: whether a backward pass of the caller's loss has reached the model's output.
        own_pass: whether the rows of the empirical Fisher come from a backward pass of our own.
        cotangents: the derivative of the caller's loss with respect to what ``pick`` returns, where it is needed.
        by_backward: for each parameter whose rows took one backward pass a sample, by id, the reason.
        mixes_samples: whether some layer's output for one sample depends on other samples.
        extra_records: further records of the same forward, one for each further row of a sample.
        loss_seen: whether the derivative of the caller's loss with respect to the model's output is known.
        is_extra: whether this is one of the extra records of another one.
        seen: the likelihood and the tensor that it saw, to be compared with the caller's loss; None if that is not due.
        drawn: how many forwards had drawn labels before this one, and the generator's state then; None if it drew none.
    """

    call: Call
    samples: int = 0
    pick: Callable[[Any], list[Tensor]] = tensors_in
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    proves: bool = False
    layers_with_grads: set[str] = field(default_factory=set)
    unbatched: dict[str, str] = field(default_factory=dict)
    unattributed: dict[int, str] = field(default_factory=dict)
    unused: set[int] = field(default_factory=set)
    per_sample_grads: dict[int, Tensor] = field(default_factory=dict)
    gradient_sums: dict[int, Tensor] = field(default_factory=dict)
    backward_seen: bool = False
    own_pass: bool = False
    cotangents: list[Tensor | None] | None = None
    by_backward: dict[int, str] = field(default_factory=dict)
    mixes_samples: bool = False
    extra_records: list[Record] = field(default_factory=list)
    loss_seen: bool = False
    is_extra: bool = False
    seen: tuple[Any, Tensor] | None = None
    drawn: tuple[int, Tensor] | None = None

    def for_another_row(self) -> Record:
        """Return a record of the same forward without output gradients, for a further row of each sample."""
        calls = {name: [call.without_grads() for call in calls] for name, calls in self.calls.items()}
        return replace(
            self, calls=calls, layers_with_grads=set(), per_sample_grads={}, gradient_sums={}, backward_seen=False,
            by_backward={}, extra_records=[], cotangents=None, is_extra=True, seen=None,
        )  # fmt: skip

    def add_cotangents(self, cotangents: Sequence[Tensor | None]) -> None:
        """Add the derivatives of a further backward pass of the caller to `cotangents`."""
        before = self.cotangents or [None] * len(cotangents)
        self.cotangents = [add(old, new) for old, new in zip(before, cotangents, strict=True)]

    def undo(self) -> Callable[[], None]:
        """Return a function that gives the record the output gradients and rows back that it has now."""
        grads = [(call, list(call.output_grads)) for call in self.all_calls()]
        rows, sums, cotangents = dict(self.per_sample_grads), dict(self.gradient_sums), self.cotangents
        loss_seen = self.loss_seen

        def restore() -> None:
            for call, before in grads:
                call.output_grads = before
            self.per_sample_grads, self.gradient_sums, self.cotangents = rows, sums, cotangents
            self.loss_seen = loss_seen

        return restore

    def all_calls(self) -> list[LayerCall]:
        """Return the calls of all layers, always in the same order."""
        return [call for calls in self.calls.values() for call in calls]

    def outputs_in_graph(self) -> list[tuple[LayerCall, int, GradientEdge]]:
        """Return every layer output that is in the graph: its call, its index among the outputs, and its edge."""
        outputs = [(call, index, edge) for call in self.all_calls() for index, edge in enumerate(call.edges)]
        return [(call, index, edge) for call, index, edge in outputs if edge is not None]

    def keep_calls(self, nodes: Container[Any]) -> None:
        """Forget the calls whose outputs are not among these nodes of the graph.

        The rows do not depend on what such a call returned, so that it need not have an entry for each sample: DoRA
        sends an identity matrix through its layers, and takes a norm of the result as a constant.
        """
        for name, calls in list(self.calls.items()):
            kept = [call for call in calls if any(edge is not None and edge.node in nodes for edge in call.edges)]
            if kept:
                self.calls[name] = kept
            else:
                del self.calls[name]

    def release_edges(self) -> None:
        """Drop the references to the graph, so that its memory can be freed."""
        for call in self.all_calls():
            call.edges = [None] * len(call.edges)

    def clear(self) -> None:
        """Drop all tensors. This matters if an output of the model still exists, whose graph refers to the record."""
        self.call, self.seen, self.cotangents = Call(()), None, None
        for collection in (self.calls, self.extra_records, self.per_sample_grads, self.gradient_sums):
            collection.clear()


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of two tensors; None stands for zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second
