"""Output gradients of the empirical Fisher: they come with the backward of the caller's own loss.

Hooks copy them into the record as that backward passes. Two cases need a backward pass of our own, which starts from
the loss's derivative with respect to the model's output: detached batch statistics, and unattributed parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.explicit_rows import ExplicitRows
from tengrad_triton.capture.flag import ScopedFlag
from tengrad_triton.capture.record import LayerCall, Record


class LossGrads:
    """Has the backward of the caller's loss fill in the output gradients of a record.

    Args:
        explicit_rows: finds the rows that no rule describes.
        detached_statistics: set during our own backward passes.
        suspended: set during our own passes, so that no hook takes them for the caller's.
    """

    def __init__(self, explicit_rows: ExplicitRows, detached_statistics: ScopedFlag, suspended: ScopedFlag) -> None:
        self._explicit_rows = explicit_rows
        self._detached_statistics = detached_statistics
        self._suspended = suspended

    def after_forward(self, record: Record, output: Any, results: Sequence[Tensor]) -> None:
        """Attach the hooks; ``results`` are the tensors in the model's ``output`` that require gradients."""
        if not record.mixes_samples:
            _keep_output_grads(record)
        for parameter in self._explicit_rows.rerun_parameters(record):
            _keep_gradient_sum(record, parameter)
        unattributed = self._explicit_rows.unattributed(record)
        if record.mixes_samples or unattributed:
            self._start_own_pass_at(results[0], record, unattributed)

    def after_backward(self, record: Record) -> None:
        """Fill in the rows that come from running layers again: the output gradients for that are there now."""
        self._explicit_rows.fill_by_layer(record)

    def _start_own_pass_at(self, output: Tensor, record: Record, unattributed: Sequence[Tensor]) -> None:
        """Have our own backward passes run when the caller's backward reaches the model's output."""

        def hook(grad: Tensor) -> None:
            handle.remove()  # our own passes start here too
            record.paused = True
            with self._suspended.set(), self._detached_statistics.set():
                if record.mixes_samples:
                    _fill_output_grads(record, output, grad)
                self._explicit_rows.fill_unattributed(record, unattributed, [output], [grad])
            record.paused = False

        handle = output.register_hook(hook)


def _keep_output_grads(record: Record) -> None:
    """Have the next backward leave the derivative with respect to every layer output in the record."""

    def keep(call: LayerCall, place: int, index: int) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            grad = grads[index]
            if grad is not None and not record.paused:
                # Not a detached alias: autograd may overwrite a gradient tensor to which it has the only reference.
                own = grad.detach() if grad.requires_grad else grad
                before = call.output_grads[place]
                call.output_grads[place] = own if before is None else before + own

        return hook

    for call, place, edge in record.outputs_in_graph():
        edge.node.register_prehook(keep(call, place, edge.output_nr))
    record.release_edges()


def _keep_gradient_sum(record: Record, parameter: Tensor) -> None:
    """Have the next backward leave the parameter's gradient in the record."""

    def hook(grad: Tensor) -> None:
        handle.remove()
        record.gradient_sums[id(parameter)] = grad.detach()

    handle = parameter.register_hook(hook)


def _fill_output_grads(record: Record, output: Tensor, grad: Tensor) -> None:
    """Take one backward pass from the derivative ``grad`` with respect to ``output``."""
    outputs = record.outputs_in_graph()
    edges = [edge for _, _, edge in outputs]
    grads = torch.autograd.grad(output, edges, grad, retain_graph=True, allow_unused=True)
    for (call, place, _), output_grad in zip(outputs, grads, strict=True):
        call.output_grads[place] = output_grad
    record.release_edges()
