"""The derivatives that make J's rows: by the layers' outputs where a rule describes the layer, else rows themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.batch_statistics import Switch
from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.graph_checks import leaves_reached, mixing_layers
from tengrad_triton.capture.record import LayerCall, Record, listen
from tengrad_triton.capture.rerun import backward_rows, batched_grads, rerun_rows, sums_to
from tengrad_triton.layers import graph_counts_calls, mixes_samples
from tengrad_triton.likelihoods import Fisher, HasHessianFactor, Likelihood

Row = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""The derivatives of one row of each sample by what was asked for, and by the model's outputs."""
_MIXES = "what it returns for one sample reaches the losses of others"
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)  # each of which torch raises for what it cannot
_ANOTHER = "its module, run again, is another function: it is random, has a state, or mixes samples"


@dataclass
class OutputGrads:
    """Finds the derivatives behind one forward's record.

    Attributes:
        model: the module itself, not compiled.
        sources: the layers and the parameters that their calls use.
        fisher: which rows there are.
        likelihood: what they are rows of.
        generator: draws labels.
        draws: labels drawn for each sample.
        max_bytes: that the exact Hessian factor may take, and the rows of one parameter without a rule.
        unattributed_too: whether parameters that are used outside of their layers get rows, by a backward pass a sample.
        switch: has backward passes take batch statistics for constants.
        irreproducible: parameters, by id, whose module was another function when it was run again.
        only_by_graph: parameters, by id, for which that held of the whole model too.
        mixing: layers, by name, whose calls belong to no single samples.
        verified: the shapes of all calls for which that was looked for.
        busy: whether forwards at present are ours.
    """

    model: nn.Module
    sources: Mapping[str, CapturedLayer]
    fisher: Fisher
    likelihood: Likelihood
    generator: torch.Generator
    draws: int = 1
    max_bytes: float = math.inf
    unattributed_too: bool = False
    switch: Switch = field(default_factory=Switch)
    irreproducible: set[int] = field(default_factory=set)
    only_by_graph: set[int] = field(default_factory=set)
    mixing: set[str] = field(default_factory=set)
    verified: set[Any] = field(default_factory=set)
    busy: bool = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Say that we are busy: what is run again for a record may be the model itself, and is no forward to record."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    def find_mixing(self, record: Record, results: Sequence[Tensor]) -> None:
        """Note the layers whose outputs' entries for one sample reach the losses of others, once for each new shape.

        With a weight of its own for each sample, a derivative by what is sample n's only is the plain one times weight
        n. A table of positions, of which there are as many as samples, looks like a batch, and fails this.
        """
        shape = tuple((name, *(use.output_shape for use in uses)) for name, uses in record.calls.items())
        if shape not in self.verified:
            self.verified.add(shape)
            with self.switch.constants():
                self.mixing |= mixing_layers(record, results, self.sources)
        record.unbatched |= dict.fromkeys(self.mixing & record.calls.keys(), _MIXES)

    def find_unattributed(self, record: Record, results: Sequence[Tensor]) -> None:
        """Note the parameters that the graph reaches in other ways than by calls that a rule or a rerun describes."""
        reached = leaves_reached(results)
        for parameter, owners in self._owners().items():
            why = self._why_stray(record, parameter, owners, reached[id(parameter)])
            if why is not None:
                record.unattributed[id(parameter)] = why

    def _owners(self) -> dict[Tensor, list[str]]:
        """Return the layers whose calls use a parameter, for each that is trained."""
        owners: dict[Tensor, list[str]] = {}
        for name, source in self.sources.items():
            for parameter in source.parameters.values():
                if parameter.requires_grad:
                    owners.setdefault(parameter, []).append(name)
        return owners

    def _why_stray(self, record: Record, parameter: Tensor, owners: Sequence[str], reached: int) -> str | None:
        unbatched = [record.unbatched[name] for name in owners if name in record.unbatched]
        if unbatched:
            return unbatched[0]
        layers = [self.sources[name] for name in owners]
        calls = sum(len(record.calls.get(name, [])) for name in owners)
        if reached and not calls:
            return "its layer is not called"
        if not any(source.rerun for source in layers):
            outside = reached > calls and all(graph_counts_calls(source.layer) for source in layers)
            return "it is used outside of its layer too" if outside else None
        if not all(source.rerun for source in layers):
            return "it is shared between a layer with a rule and one without"
        return _ANOTHER if id(parameter) in self.irreproducible else self._too_large(record, parameter)

    def _too_large(self, record: Record, parameter: Tensor) -> str | None:
        needed = record.samples * parameter.numel() * parameter.element_size()
        if needed <= self.max_bytes:
            return None
        return (
            f"its rows would take {needed / 2**30:.2f} GiB, where max_bytes allows {self.max_bytes / 2**30:.2f} GiB: "
            "raise max_bytes, or register a rule"
        )

    # Derivatives that are take_rows at once, behind a forward

    def derive(self, record: Record, output: Any, results: Sequence[Tensor]) -> None:
        """Fill in the derivatives of every row: backward passes by the layers' outputs, not by their parameters."""
        edges = [use.edges[j] for use, j in _places(record)]
        checked = [p for layer in self._reruns(record).values() for p in layer.values()]
        by_backward = self._by_backward(record)
        if not edges and not by_backward:
            return
        with self.switch.constants():
            for index, (grads, cotangents) in enumerate(self._rows_of(output, results, [*edges, *checked])):
                filled = record if index == 0 else record.again()
                if index:
                    record.extra_draws.append(filled)
                for (use, j), grad in zip(_places(record, filled), grads, strict=False):
                    use.output_grads[j] = grad
                totals = zip(checked, grads[len(edges) :], strict=True)
                filled.gradient_sums = {id(p): torch.zeros_like(p) if g is None else g for p, g in totals}
                another = self.rerun(filled) if checked else []
                self._fill_by_backward(filled, [*by_backward, *another], results, cotangents)
        for use in record.all_calls():
            use.edges = [None] * len(use.edges)

    def _rows_of(self, output: Any, results: Sequence[Tensor], wanted: Sequence[Any]) -> Iterator[Row]:
        """Yield the derivatives by what is wanted and by the model's outputs, for one row of each sample at a time."""
        if self.fisher == "exact":
            _check_size(output, self.max_bytes)
            factor_RN = cast("HasHessianFactor", self.likelihood).hessian_factor(output)
            factor_RN = factor_RN * len(factor_RN) ** 0.5  # F is the mean over all rows, R of each sample
            for row, grads in enumerate(batched_grads([output], wanted, [factor_RN])):
                yield grads, [factor_RN[row]]
            return
        for _ in range(self.draws):
            target = self.likelihood.sample(tree_map_only(Tensor, Tensor.detach, output), self.generator)
            nll = self.likelihood.nll(output, target)
            grads = torch.autograd.grad(nll, [*wanted, *results], retain_graph=True, allow_unused=True)
            by_results = zip(results, grads[len(wanted) :], strict=True)
            yield grads[: len(wanted)], [torch.zeros_like(r) if g is None else g for r, g in by_results]

    def _reruns(self, record: Record) -> dict[str, dict[str, Tensor]]:
        """Return the parameters whose rows come from running their layer again, by layer and by name within it."""
        reruns = {
            name: {
                label: p
                for label, p in source.parameters.items()
                if p.requires_grad and id(p) not in record.unattributed
            }
            for name, source in self.sources.items()
            if source.rerun and name in record.calls
        }
        return {name: parameters for name, parameters in reruns.items() if parameters}

    def rerun(self, record: Record) -> list[Tensor]:
        """Fill in the rows of layers without a rule; return the parameters for which that does not work."""
        rows: dict[Tensor, list[Tensor]] = {}
        for name, parameters in self._reruns(record).items():
            try:
                of_layer = rerun_rows(self.sources[name].layer, parameters, record.calls[name], record.samples)
            except _REFUSALS:
                of_layer = {}
            for label, parameter in parameters.items():
                rows.setdefault(parameter, []).extend([of_layer[label]] if label in of_layer else [])
        another = []
        for parameter, parts in rows.items():
            total = record.gradient_sums.get(id(parameter))
            summed = torch.stack(parts).sum(0) if parts else None
            if total is None or summed is None or not sums_to(summed, total):
                self.irreproducible.add(id(parameter))
                record.unattributed[id(parameter)] = _ANOTHER
                another.append(parameter)
            else:
                record.per_sample_grads[id(parameter)] = summed
        return another

    def _by_backward(self, record: Record) -> list[Tensor]:
        """Return the parameters whose rows the graph itself has to give."""
        unattributed = (
            [(p, o) for p, o in self._owners().items() if id(p) in record.unattributed] if self.unattributed_too else []
        )
        # Where batch statistics are constants, passes go past the parameters of their layer.
        passed = [
            p for p, owners in unattributed if not any(mixes_samples(self.sources[name].layer) for name in owners)
        ]
        return [p for p in passed if self._too_large(record, p) is None]

    def _fill_by_backward(
        self, record: Record, parameters: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> None:
        """Fill in rows from the whole model run again, or, where that is another function, from the graph itself."""
        if not parameters:
            return
        again = [] if record.mixes_samples else [p for p in parameters if id(p) not in self.only_by_graph]
        if again:
            record.per_sample_grads |= self._rows_of_model(record, again, results, cotangents)
        left = [p for p in parameters if id(p) not in record.per_sample_grads]
        self.only_by_graph |= set(map(id, left))
        if left:
            rows = backward_rows(results, cotangents, left, record.samples)
            record.per_sample_grads |= {id(p): j for p, j in zip(left, rows, strict=True)}
            record.used_backward_per_sample = True

    def _rows_of_model(
        self, record: Record, parameters: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        named = {name: p for name, p in self.model.named_parameters() if any(p is other for other in parameters)}
        totals = torch.autograd.grad(
            results, list(named.values()), cotangents, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        call = LayerCall(
            record.call, [None] * len(results), returns_tensor=False, output_grads=list(cotangents), versions=[0]
        )
        try:
            rows = rerun_rows(self.model, named, [call], record.samples)
        except _REFUSALS:
            return {}
        pairs = zip(named.items(), totals, strict=True)
        return {id(p): rows[name] for (name, p), total in pairs if sums_to(rows[name], total)}

    # Derivatives that come with the loss's own backward

    def listen(self, record: Record, results: Sequence[Tensor]) -> None:
        """Have the backward of the loss leave its derivatives in the record.

        Where it cannot, a pass of our own starts from the loss's derivatives by the output: where batch statistics are
        to be constants, or rows come from the graph itself.
        """
        if not record.mixes_samples:
            listen(record)
        for parameters in self._reruns(record).values():
            for parameter in parameters.values():
                _keep_total(record, parameter)
        by_backward = self._by_backward(record)
        if record.mixes_samples or by_backward:
            self._start_at_output(record, results, by_backward)

    def _start_at_output(self, record: Record, results: Sequence[Tensor], by_backward: Sequence[Tensor]) -> None:
        def hook(grad: Tensor) -> None:
            handle.remove()  # the passes below begin here too
            record.paused = True
            with self.suspended(), self.switch.constants():
                if record.mixes_samples:
                    self._fill_uses(record, results[0], grad)
                self._fill_by_backward(record, by_backward, results[:1], [grad])
            record.paused = False

        handle = results[0].register_hook(hook)

    def _fill_uses(self, record: Record, output: Tensor, grad: Tensor) -> None:
        places = _places(record)
        edges: list[Any] = [use.edges[j] for use, j in places]
        grads = torch.autograd.grad(output, edges, grad, retain_graph=True, allow_unused=True)
        for (use, j), by_output in zip(places, grads, strict=True):
            use.output_grads[j] = by_output
            use.edges[j] = None


def _places(record: Record, other: Record | None = None) -> list[tuple[LayerCall, int]]:
    """Return every output that stands in the graph, as its use (or the same one in another record) and its index."""
    pairs = zip(record.all_calls(), (other or record).all_calls(), strict=True)
    return [(twin, j) for use, twin in pairs for j, edge in enumerate(use.edges) if edge is not None]


def _keep_total(record: Record, parameter: Tensor) -> None:
    """Have the next backward leave the parameter's gradient in the record."""

    def hook(grad: Tensor) -> None:
        handle.remove()
        record.gradient_sums[id(parameter)] = grad.detach()

    handle = parameter.register_hook(hook)


def _check_size(output: Tensor, max_bytes: float) -> None:
    rows = output[0].numel()
    needed = rows * output.numel() * output.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"fisher='exact' takes {rows} rows for each of {len(output)} samples: {needed / 2**30:.2f} GiB for the "
            f"derivatives by the outputs alone, where max_bytes allows {max_bytes / 2**30:.2f} GiB: use "
            "fisher='sampled' with fisher_samples=, or raise max_bytes"
        )
