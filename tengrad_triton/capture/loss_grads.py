"""Output gradients of the empirical Fisher: the backward of the caller's own loss computes them.

Hooks copy them into the record while that backward runs. Two cases need a backward pass of our own: detached batch
statistics, and unattributed parameters. It starts from the derivative of the loss with respect to the model's output.
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
    """Fills in the output gradients of a record while the backward of the caller's loss runs.

    Args:
        explicit_rows: finds the rows of parameters without a rule.
        detached_statistics: a flag that is set during our own backward passes.
        suspended: a flag that is set during our own passes, so that the hooks ignore them.
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

    def find_remaining_rows(self, record: Record) -> None:
        """Fill in the rows that come from running layers again, which needs the output gradients of the backward."""
        self._explicit_rows.fill_by_layer(record)

    def _start_own_pass_at(self, output: Tensor, record: Record, unattributed: Sequence[Tensor]) -> None:
        """Attach a hook that runs our own backward passes when the caller's backward reaches the model's output."""

        def hook(grad: Tensor) -> None:
            handle.remove()  # otherwise our own passes, which start here, would call this hook again
            record.paused = True
            with self._suspended.set(), self._detached_statistics.set():
                if record.mixes_samples:
                    _fill_output_grads(record, output, grad)
                self._explicit_rows.fill_unattributed(record, unattributed, [output], [grad])
            record.paused = False

        handle = output.register_hook(hook)


def _keep_output_grads(record: Record) -> None:
    """Attach hooks by which the next backward stores the output gradients of every layer in the record."""

    def storing_hook(call: LayerCall, place: int, index: int) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            grad = grads[index]
            if grad is not None and not record.paused:
                # Store the tensor itself: autograd may overwrite a gradient to which only an alias refers.
                constant = grad.detach() if grad.requires_grad else grad
                before = call.output_grads[place]
                call.output_grads[place] = constant if before is None else before + constant

        return hook

    for call, place, edge in record.outputs_in_graph():
        edge.node.register_prehook(storing_hook(call, place, edge.output_nr))
    record.release_edges()


def _keep_gradient_sum(record: Record, parameter: Tensor) -> None:
    """Attach a hook by which the next backward stores the parameter's gradient in the record."""

    def hook(grad: Tensor) -> None:
        handle.remove()
        record.gradient_sums[id(parameter)] = grad.detach()

    handle = parameter.register_hook(hook)


def _fill_output_grads(record: Record, output: Tensor, grad: Tensor) -> None:
    """Fill in all output gradients by one backward pass from ``grad``, the derivative with respect to ``output``."""
    outputs = record.outputs_in_graph()
    edges = [edge for _, _, edge in outputs]
    grads = torch.autograd.grad(output, edges, grad, retain_graph=True, allow_unused=True)
    for (call, place, _), output_grad in zip(outputs, grads, strict=True):
        call.output_grads[place] = output_grad
    record.release_edges()
