"""Attribution: which parameters get their rows from the recorded calls of their layers.

The calls give a parameter's rows if they are its only uses and do not mix samples. A rule, or a rerun of the layer,
then computes the rows from the calls. The other parameters are unattributed: their rows need the whole graph, or they
take the SGD step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.flag import ScopedFlag
from tengrad_triton.capture.graph_checks import leaves_reached, mixing_layers
from tengrad_triton.capture.record import Record
from tengrad_triton.layers import graph_counts_calls, mixes_samples

_MIXING = "its outputs for one sample reach the losses of other samples"
_IRREPRODUCIBLE = (
    "its module computes something else when it is run again, because it is random, has a state, or mixes samples: "
    "register a rule"
)


class Attribution:
    """Finds the unattributed parameters of each forward, and stores which layers and parameters failed a check.

    Args:
        layers: the captured layers, by name.
        detached_statistics: a flag that is set for the backward passes of the checks.
        max_parameter_bytes: the most bytes that the rows of one parameter without a rule may take.
    """

    def __init__(
        self, layers: Mapping[str, CapturedLayer], detached_statistics: ScopedFlag, max_parameter_bytes: float
    ) -> None:
        self.layers = layers
        self._detached_statistics = detached_statistics
        self._max_parameter_bytes = max_parameter_bytes
        self._irreproducible: set[int] = set()  # ids of parameters
        self._mixing: set[str] = set()  # names of layers
        self._checked_shapes: set[Any] = set()

    def check(self, record: Record, results: Sequence[Tensor]) -> None:
        """Fill in ``record.unbatched`` and ``record.unattributed``; ``results`` are the tensors the model returned."""
        self._check_mixing(record, results)
        reached = leaves_reached(results)
        for parameter, owners in self._owners().items():
            why = self._why_unattributed(record, parameter, owners, reached[id(parameter)])
            if why is not None:
                record.unattributed[id(parameter)] = why

    def unattributed(self, record: Record) -> list[Tensor]:
        """Return the unattributed parameters whose rows a pass through the graph can find, within the memory allowed.

        A pass with detached statistics bypasses the batch norm, so it cannot find the rows of the batch norm's own
        parameters.
        """
        return [
            parameter
            for parameter, owners in self._owners().items()
            if id(parameter) in record.unattributed
            and not any(mixes_samples(self.layers[name].layer) for name in owners)
            and self._why_too_large(record, parameter) is None
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

    def mark_irreproducible(self, record: Record, parameter: Tensor) -> None:
        """Make a parameter unattributed, now and later, because running its module again gave other gradients."""
        self._irreproducible.add(id(parameter))
        record.unattributed[id(parameter)] = _IRREPRODUCIBLE

    def _check_mixing(self, record: Record, results: Sequence[Tensor]) -> None:
        """Find the layers that mix samples, once for every new combination of output shapes.

        The output of a table with as many positions as samples has the shape of a batch, but each of its vectors
        reaches the losses of all samples.
        """
        shapes = tuple((name, *(call.output_shape for call in calls)) for name, calls in record.calls.items())
        if shapes not in self._checked_shapes:
            self._checked_shapes.add(shapes)
            with self._detached_statistics.set():
                self._mixing |= mixing_layers(record, results, self.layers)
        record.unbatched |= dict.fromkeys(self._mixing & record.calls.keys(), _MIXING)

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
        return _IRREPRODUCIBLE if id(parameter) in self._irreproducible else self._why_too_large(record, parameter)

    def _why_too_large(self, record: Record, parameter: Tensor) -> str | None:
        needed = record.samples * parameter.numel() * parameter.element_size()
        if needed <= self._max_parameter_bytes:
            return None
        return (
            f"its rows would take {needed / 2**30:.2f} GiB, where max_bytes allows "
            f"{self._max_parameter_bytes / 2**30:.2f} GiB: raise max_bytes, or register a rule"
        )
