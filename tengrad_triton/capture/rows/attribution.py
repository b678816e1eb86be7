"""Attribution: which parameters get their rows from the recorded calls of their layers.

The calls give a parameter's rows if they are its only uses and do not mix samples. A rule, or a rerun of the layer,
then computes the rows from the calls. The other parameters are unattributed: their rows need the whole graph, or they
take the SGD step. What the graph does not show, the proof does (`proof.py`): parameters whose rows autograd contradicts
are unattributed too, in all forwards of the same structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import Findings, Record
from tengrad_triton.capture.rows.graph import GraphWalk, walk_graph
from tengrad_triton.layers import graph_counts_calls, locate_samples, samples_dim

Verify = Literal["change", "always", "never"]
"""When the rows are compared with autograd."""
_IRREPRODUCIBLE = (
    "its module computes something else when it is run again, because it is random, has a state, or mixes samples: "
    "register a rule"
)
_MOST_STRUCTURES = 256


class Attribution:
    """Finds the unattributed parameters of each forward, and stores what was found out about forwards like it.

    Args:
        layers: the captured layers, by name.
        max_parameter_bytes: the most bytes that the rows of one parameter without a rule may take.
        verify: when rows are compared with autograd.

    Attributes:
        refresh: the number of the present refresh.
    """

    def __init__(self, layers: Mapping[str, CapturedLayer], max_parameter_bytes: float, verify: Verify) -> None:
        self._max_parameter_bytes, self._verify = max_parameter_bytes, verify
        self._findings: dict[Any, Findings] = {}
        self.refresh = 0
        self.follow(layers)

    def follow(self, layers: Mapping[str, CapturedLayer]) -> None:
        """Take other layers from now on, and forget what was found out."""
        self.layers = layers
        self._sequence_first = any(samples_dim(captured.layer) == 1 for captured in layers.values())
        self._findings.clear()

    def check(self, record: Record, results: Sequence[Tensor]) -> bool:
        """Fill in what follows from the calls and the graph of a forward; return whether it uses trained parameters.

        ``results`` are the tensors that the rows are derivatives of, or that the model returned.

        Raises:
            ValueError: a part of the model is checkpointed in a way that autograd cannot take derivatives of.
        """
        owners = self._owners()
        walk = walk_graph(results, owners, record.samples)
        if walk.is_reentrant:
            raise ValueError(
                "activation checkpointing with use_reentrant=True allows no derivatives with respect to the outputs of "
                "layers, which a refresh of the curvature takes: call checkpoint(..., use_reentrant=False)"
            )
        record.keep_calls(walk.nodes)
        for name, calls in record.calls.items():
            for call in calls if self.layers[name].has_rule else []:
                layer, where = self.layers[name].layer, (record.samples, self._sequence_first)
                why, call.samples_second = locate_samples(layer, call.output_shape, *where)
                if why:
                    record.unbatched[name] = why
        record.findings = self._findings_of(record, results, walk)
        record.proves = self._proves(record.findings, walk)
        for parameter, names in owners.items():
            key = id(parameter)
            why = record.findings.refuted.get(key)
            why = why or self._why_unattributed(record, parameter, names, walk.leaves[key])
            if why is not None:
                record.unattributed[key] = why
            if not walk.leaves[key]:
                record.unused.add(key)
        return len(record.unused) < len(owners)

    def _findings_of(self, record: Record, results: Sequence[Tensor], walk: GraphWalk) -> Findings:
        """Return what was found out about forwards of this structure: the graph, the calls, and what has N entries."""

        def sizes(shape: Sequence[int]) -> tuple[bool, ...]:
            return tuple(size == record.samples for size in shape)

        def modes(layer: nn.Module) -> tuple[Any, ...]:
            return type(layer), "forward" in vars(layer), layer.training, len(layer._forward_hooks)

        calls = tuple(
            (name, modes(self.layers[name].layer), *((sizes(call.output_shape), call.samples_second) for call in calls))
            for name, calls in record.calls.items()
        )
        hooked = tuple(id(p) for p in self._owners() if p._backward_hooks)  # which change gradients, and so rows
        key = (walk.structure, calls, hooked, tuple((sizes(x.shape), x.dtype) for x in results))
        if key not in self._findings and len(self._findings) == _MOST_STRUCTURES:
            self._findings.pop(next(iter(self._findings)))
        findings = self._findings.setdefault(key, Findings())
        if findings.last != self.refresh:  # all forwards of a refresh are treated alike
            findings.refreshes, findings.last = findings.refreshes + 1, self.refresh
        return findings

    def _proves(self, findings: Findings, walk: GraphWalk) -> bool:
        """Whether the rows of this forward are compared with autograd.

        A gate that begins at zero shows only in later forwards which samples it mixes, so the comparison is repeated in
        the 2nd, 8th, 64th, … refresh with the same structure, and at each where an operation may mix them.
        """
        if self._verify != "change":
            return self._verify == "always"
        count = findings.refreshes
        return walk.may_mix or count <= 2 or (count.bit_count() == 1 and count.bit_length() % 3 == 1)

    def unattributed(self, record: Record) -> list[Tensor]:
        """Return the unattributed parameters whose rows the graph can give, within the memory allowed."""
        return [
            parameter
            for parameter in self._owners()
            if id(parameter) in record.unattributed and self.why_too_large(record, parameter) is None
        ]

    def rerun_layers(self, record: Record) -> dict[str, dict[str, Tensor]]:
        """Return, for each layer to run again, the parameters whose rows this gives, by name within the layer."""
        parameters = {
            name: {
                parameter_name: p
                for parameter_name, p in captured.parameters.items()
                if p.requires_grad and id(p) not in record.unattributed
            }
            for name, captured in self.layers.items()
            if not captured.has_rule and name in record.calls
        }
        return {name: named for name, named in parameters.items() if named}

    def refute(self, record: Record, parameter: Tensor, why: str = _IRREPRODUCIBLE) -> None:
        """Make a parameter unattributed, in this forward and later ones of the same structure."""
        record.findings.refuted[id(parameter)] = record.unattributed[id(parameter)] = why

    def trained(self) -> list[Tensor]:
        """Return the trained parameters that the captured layers use."""
        return list(self._owners())

    def _owners(self) -> dict[Tensor, list[str]]:
        """Return, for each trained parameter, the names of the layers whose calls use it."""
        owners: dict[Tensor, list[str]] = {}
        for name, captured in self.layers.items():
            for parameter in captured.parameters.values():
                if parameter.requires_grad:
                    owners.setdefault(parameter, []).append(name)
        return owners

    def _why_unattributed(self, record: Record, parameter: Tensor, owners: Sequence[str], edges: int) -> str | None:
        """Return why calls of its owners do not give a parameter's rows, or None if they do.

        Args:
            record: the forward.
            parameter: the parameter.
            owners: the names of the layers whose calls use it.
            edges: how many edges of the graph end in it.
        """
        unbatched = [record.unbatched[name] for name in owners if name in record.unbatched]
        if unbatched:
            return unbatched[0]
        layers = [self.layers[name] for name in owners]
        calls = sum(len(record.calls.get(name, [])) for name in owners)
        if edges and not calls:
            return "its layer is not called"
        if all(captured.has_rule for captured in layers):
            outside = edges > calls and all(graph_counts_calls(captured.layer) for captured in layers)
            return "it is used outside of its layer too" if outside else None
        if any(captured.has_rule for captured in layers):
            return "it is shared between a layer with a rule and one without"
        return self.why_too_large(record, parameter)

    def why_too_large(self, record: Record, parameter: Tensor) -> str | None:
        """Return why explicit rows of a parameter would take too much memory, or None if they would not."""
        needed = record.samples * parameter.numel() * parameter.element_size()
        if needed <= self._max_parameter_bytes:
            return None
        return (
            f"its rows would take {needed / 2**30:.2f} GiB, where max_bytes allows "
            f"{self._max_parameter_bytes / 2**30:.2f} GiB: raise max_bytes, or register a rule"
        )
