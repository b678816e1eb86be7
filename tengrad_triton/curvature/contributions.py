"""From captured calls of layers to what they contribute to the rows of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tengrad_triton.capture.blocks import LayerParams, full_name, wide_dtype
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.record import Record
from tengrad_triton.capture.rows.rule import ById, Pairs, contributions_of, pairs_of_calls
from tengrad_triton.curvature.concat import MicroBatches, in_float64, take_rows
from tengrad_triton.curvature.geometry import Geometry, geometry_of_calls, geometry_of_rows
from tengrad_triton.layers import Call, Contribution, Inputs, PerSampleGrads


@dataclass(frozen=True)
class Contributions:
    """What the batches of one step contribute to the rows of J.

    Attributes:
        by_layer: for every layer that has rows, by name: its parameters' `MicroBatches`, by their names within it.
        parts: R, the number of processes among which outputs are cut: `geometries` are those of one.
    """

    by_layer: dict[str, Mapping[str, MicroBatches]]
    parts: int = 1

    @property
    def layers(self) -> list[str]:
        """Return the names of the layers that have rows."""
        return list(self.by_layer)

    @property
    def batch_rows(self) -> list[int]:
        """Return how many rows each micro-batch has."""
        batches = next((batches for layer in self.by_layer.values() for batches in layer.values()), [])
        return [calls[0].samples for calls in batches]

    @property
    def rows(self) -> int:
        """Return N, the number of rows that J will have."""
        return sum(self.batch_rows)

    def of_type(self, dtype: torch.dtype) -> Contributions:
        """Return them in float64 if that is the type of the curvature: all parameters share the products of a step."""
        if dtype != torch.float64:
            return self

        def wide(batches: MicroBatches) -> MicroBatches:
            return [[in_float64(call) for call in calls] for calls in batches]

        return self._each(wide)

    def take(self, rows: Sequence[Tensor]) -> Contributions:
        """Return the contributions to some rows, given by their indices within each micro-batch."""

        def some(batches: MicroBatches) -> MicroBatches:
            pairs = zip(batches, rows, strict=True)
            return [[take_rows(call, index) for call in calls] for calls, index in pairs if len(index)]

        return self._each(some)

    def _each(self, function: Callable[[MicroBatches], MicroBatches]) -> Contributions:
        layers = self.by_layer.items()
        found: dict[str, Mapping[str, MicroBatches]] = {
            name: {param_name: function(b) for param_name, b in layer.items()} for name, layer in layers
        }
        return Contributions(found, self.parts)

    def sample(self, most: int, generator: torch.Generator) -> Contributions:
        """Return at most ``most`` rows, the same rows for all layers, drawn uniformly: F stays unbiased (M10)."""
        sizes = self.batch_rows
        if sum(sizes) <= most:
            return self
        drawn, _ = torch.randperm(sum(sizes), generator=generator)[:most].sort()
        ends = torch.tensor(sizes).cumsum(0)
        return self.take(
            [drawn[(drawn >= end - n) & (drawn < end)] - (end - n) for n, end in zip(sizes, ends, strict=True)]
        )

    def geometries(self) -> dict[str, Geometry]:
        """Return the sizes of every weight whose representation can be chosen, by its full name."""
        return self._sizes(geometry_of_calls)

    def explicit(self) -> dict[str, Geometry]:
        """Return the sizes of every parameter whose rows are given, by its full name."""

        def of_rows(calls: Sequence[Contribution]) -> Geometry | None:
            return next((geometry_of_rows(call) for call in calls if isinstance(call, PerSampleGrads)), None)

        return self._sizes(of_rows)

    def _sizes(self, of_calls: Callable[[Sequence[Contribution]], Geometry | None]) -> dict[str, Geometry]:
        rows, geometries = self.rows, {}
        for name, layer in self.by_layer.items():
            for param_name, batches in layer.items():
                first = of_calls(batches[0])
                if first is not None:
                    stored = first.factored_bytes * rows // first.samples
                    own = replace(first, samples=rows, factored_bytes=stored)
                    geometries[full_name(name, param_name)] = own.of_part(self.parts)
        return geometries


def gather(
    layers: Sequence[LayerParams], capture: Capture, release_calls: bool
) -> tuple[Contributions, dict[str, str]]:
    """Return the contributions of the calls captured since the last step, and why some layers have none, by name.

    Layers that no forward used have none either, but the second result does not name them.

    Args:
        layers: of the optimizer.
        capture: holds the records of those calls.
        release_calls: drop each layer's captured calls once its contributions are there, and everything at the end.
            This bounds memory. On a CPU it makes later steps slower, because glibc returns freed memory to the system.

    Raises:
        RuntimeError: nothing was captured, or the batch had no samples.
        ValueError: a rule returned rows of another size than its parameter; or the empirical Fisher has no rows,
            because the loss is made of derivatives of the model's output.
    """
    capture.check_counted()
    covered = {layer.name: layer for layer in layers if layer.why_sgd is None and layer.trained()}
    if covered and not capture.records:
        if capture.was_empty:
            raise RuntimeError(
                "the curvature is due for a refresh, but the batch has 0 samples: take no step for an empty batch"
            )
        raise RuntimeError(
            "the curvature is due for a refresh, but there was no forward and backward of the model since the last "
            "step or zero_grad: call model(inputs) itself, with gradients enabled and samples in the batch, before "
            "loss.backward() (not autograd.grad) and optimizer.step()"
        )
    # A record of a further row of the same samples is joined as a micro-batch is.
    batches = [_of_record(capture, record, release_calls) for record in capture.records]
    found: dict[str, Mapping[str, MicroBatches]] = {}
    missing: dict[str, str] = {}
    for name, layer in covered.items():
        own = [layer.parameters[param_name] for param_name in layer.trained()]
        trained = {param_name: capture.used.of(p) for param_name, p in zip(layer.trained(), own, strict=True)}
        if not any(id(p) in by_id for p in trained.values() for by_id in batches) and _is_idle(own, trained, capture):
            continue
        for parameter in trained.values():
            _add_zero_rows(parameter, batches, capture.records)
        absent = [p for p in trained.values() if not all(id(p) in by_id for by_id in batches)]
        if absent:
            missing[name] = _why_missing(absent[0], capture)
        else:
            # A parameter that several layers share is in one layer only: `find_layer_params` sees to that.
            found[name] = {param_name: [by_id.pop(id(p)) for by_id in batches] for param_name, p in trained.items()}
    if release_calls:
        capture.forget()
    return Contributions(found).of_type(wide_dtype(layers)), missing


def _of_record(capture: Capture, record: Record, release_calls: bool) -> ById:
    """Return what one captured forward contributes."""
    batch = tree_leaves((record.call.args, record.call.kwargs))
    batch_storages = {x.untyped_storage().data_ptr() for x in batch if isinstance(x, Tensor)}
    scale = capture.scale
    calls_of = record.calls if release_calls else dict(record.calls)
    with_rule = {}
    for name, layer in capture.layers.items():
        if any(call.has_grads for call in calls_of.get(name, [])):
            record.layers_with_grads.add(name)
        if not layer.has_rule or name in record.unbatched:
            calls_of.pop(name, None)
        else:
            with_rule[name] = layer

    def pairs_of(name: str) -> Pairs:
        pairs = pairs_of_calls(name, calls_of.pop(name, []), scale)
        return [(_unshared(x, batch_storages), output_grads) for x, output_grads in pairs]

    explicit = {key: scale * rows if scale != 1 else rows for key, rows in record.per_sample_grads.items()}
    return contributions_of(with_rule, pairs_of, explicit, record.unattributed, record.samples)


def _unshared(x: Inputs, batch_storages: Collection[int]) -> Inputs:
    """Return a layer's input, cloned where it shares storage with the caller's batch.

    A training loop may write its next batch into the same tensor.
    """
    if isinstance(x, Call):
        args, kwargs = tree_map_only(Tensor, partial(_unshared, batch_storages=batch_storages), (x.args, x.kwargs))
        return replace(x, args=args, kwargs=kwargs)
    return x.clone() if x.untyped_storage().data_ptr() in batch_storages else x


def _is_idle(own: Sequence[Tensor], used: Mapping[str, Tensor], capture: Capture) -> bool:
    """Whether no forward used any of the parameters, or none of them has a gradient."""
    unused = all(id(p) in record.unused for p in used.values() for record in capture.records)
    return unused or all(p.grad is None for p in own)


def _add_zero_rows(parameter: Tensor, batches: Sequence[ById], records: Sequence[Record]) -> None:
    """Add the rows of forwards that did not use a parameter; they are zero."""
    for by_id, record in zip(batches, records, strict=True):
        if id(parameter) not in by_id and id(parameter) in record.unused:
            by_id[id(parameter)] = [PerSampleGrads(parameter.new_zeros(record.samples, *parameter.shape))]


def _why_missing(parameter: Tensor, capture: Capture) -> str:
    """Return why a parameter has no rows."""
    for record in capture.records:
        if id(parameter) in record.unattributed:
            return record.unattributed[id(parameter)]
        for name, layer in capture.layers.items():
            param_names = [param_name for param_name, p in layer.parameters.items() if p is parameter]
            if param_names and name in record.layers_with_grads:
                return f"the rule for {type(layer.layer).__name__} returned nothing for {param_names[0]}"
    return "what the rows are derivatives of does not depend on it"
