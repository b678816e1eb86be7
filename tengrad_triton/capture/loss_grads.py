"""The rows of the empirical Fisher: derivatives of the caller's own loss, found while its backward pass runs.

Where the calls of the layers give all rows, hooks copy the output gradients of that pass. Otherwise we run a pass of
our own, which starts from the derivative of the loss with respect to the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from tengrad_triton.capture.batch_statistics import ScopedFlag
from tengrad_triton.capture.output_grads import OutputGrads
from tengrad_triton.capture.outputs import map_tensors
from tengrad_triton.capture.record import LayerCall, Record, add
from tengrad_triton.capture.rows.explicit import ExplicitRows
from tengrad_triton.capture.rows.proof import Cotangents


class LossGrads:
    """Fills in the output gradients of a record while the backward of the caller's loss runs.

    Args:
        output_grads: runs backward passes of our own.
        explicit_rows: knows which parameters have no rule.
        own: a flag that is set during passes of our own.
    """

    def __init__(self, output_grads: OutputGrads, explicit_rows: ExplicitRows, own: ScopedFlag) -> None:
        self._output_grads, self._explicit_rows, self._own = output_grads, explicit_rows, own

    def after_forward(self, record: Record) -> None:
        """Attach the hooks, unless a pass of our own is needed."""
        rows = self._explicit_rows
        apart = record.mixes_samples or rows.rerun_parameters(record) or rows.unattributed(record)
        record.own_pass = bool(apart) or record.proves or record.findings.all_through_output is False
        if not record.own_pass:
            _keep_output_grads(record, self._own)

    def on_backward(self, record: Record, starts: Sequence[Tensor]) -> None:
        """Run a pass of our own, from ``record.cotangents``, the derivatives of the loss with respect to ``starts``."""
        assert record.cotangents is not None
        record.per_sample_grads.clear()
        self._output_grads.fill(record, starts, [record.cotangents], batched=False)


def loss_cotangents(
    record: Record, output: Any, results: Sequence[Tensor], grads: Cotangents
) -> tuple[Sequence[Tensor], Cotangents]:
    """Return the tensors at which our own pass starts, and the derivative of the loss with respect to each of them.

    Args:
        record: of the forward.
        output: what the model returned, detached.
        results: the tensors in it that require gradients.
        grads: the derivatives of the loss with respect to ``results``.
    """
    grads, absent = _passed_on(results, grads, record.samples), set()

    def starts_of(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        left = iter(tensors)

        def replaced(x: Tensor) -> Tensor:
            own = next(left) if x.requires_grad else x
            if own is None:
                own = torch.zeros_like(x).detach()
                absent.add(id(own))
            return own

        return record.pick(map_tensors(replaced, output))

    with torch.enable_grad():  # the part that the user chose may be a view of a result
        starts, cotangents = starts_of(results), starts_of(grads)
    sized = [c if c.dim() and len(c) == record.samples and id(c) not in absent else None for c in cotangents]
    return starts, sized


def as_rounded(grad: Tensor) -> Tensor:
    """Return a derivative in the type that it was rounded to: float32, where a model in float64 has a loss in float32.

    A cast of the output to float32 gives such a derivative in float64, with numbers that float32 can hold.
    """
    if grad.dtype != torch.float64:
        return grad
    rounded = grad.float()
    return rounded if torch.equal(rounded.double(), grad) else grad


def _passed_on(results: Sequence[Tensor], grads: Cotangents, samples: int) -> Cotangents:
    """Return the derivatives of the loss with respect to the results that have one entry for each sample.

    The derivatives with respect to the others, such as a loss that the model returns, go on to those that they are
    computed from. Each is the partial derivative: where one of these results is computed from another one, as logits
    are from hidden states or from keys and values, what comes through the former is not part of the latter's.
    """
    batched = [place for place, result in enumerate(results) if result.dim() and len(result) == samples]
    others = [place for place in range(len(results)) if place not in batched and grads[place] is not None]
    if not others or not batched:
        return grads
    found = [grads[place] if place in batched else None for place in range(len(results))]
    first = _reached_first([results[place] for place in others], {place: results[place] for place in batched})
    passed_on: dict[int, Tensor] = {}
    for place in first:
        later = [(results[other], -partial) for other, partial in passed_on.items()]
        starts, cotangents = zip(*[*((results[o], grads[o]) for o in others), *later], strict=True)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        (grad,) = torch.autograd.grad(starts, results[place], cotangents, **options)
        if grad is not None:
            passed_on[place] = grad
            found[place] = add(found[place], grad)
    return found


def _reached_first(starts: Sequence[Tensor], results: Mapping[int, Tensor]) -> list[int]:
    """Return the keys of the results from which the starts are computed without another result between.

    A result that is computed from another one comes before it. A tensor that is there twice counts once.
    """
    key_of: dict[Any, int] = {}
    for key, result in results.items():
        edge = get_gradient_edge(result)
        key_of.setdefault((edge.node, edge.output_nr), key)
    found: dict[int, int] = {}
    seen: set[Any] = set()
    edges = map(get_gradient_edge, starts)
    waiting: list[tuple[Node | None, int]] = [(edge.node, edge.output_nr) for edge in edges]
    while waiting:
        node, place = waiting.pop()
        if node is None or (node, place) in seen:
            continue
        seen.add((node, place))
        if (node, place) in key_of:
            # The number of a later operation is larger. A leaf, which has the largest one, comes before all operations.
            found[key_of[node, place]] = -1 if hasattr(node, "variable") else node._sequence_nr()
        else:
            waiting += node.next_functions
    return sorted(found, key=lambda key: found[key], reverse=True)


def _keep_output_grads(record: Record, own: ScopedFlag) -> None:
    """Attach hooks by which the next backward stores the output gradients of every layer in the record."""

    def storing_hook(call: LayerCall, place: int, index: int) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            grad = grads[index]
            if grad is not None and not own.is_set and not record.own_pass:
                # Store the tensor itself: autograd may overwrite a gradient to which only an alias refers.
                constant = grad.detach() if grad.requires_grad else grad
                before = call.output_grads[place]
                call.output_grads[place] = constant if before is None else before + constant

        return hook

    for call, place, edge in record.outputs_in_graph():
        edge.node.register_prehook(storing_hook(call, place, edge.output_nr))
