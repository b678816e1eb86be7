"""Whether the gradient of the caller's loss reaches the parameters only through the output that has rows.

A penalty on parameters or on derivatives, an auxiliary loss, a further output, and a layer that is called beside the
model add to the gradient, but F has no rows of them. One more backward pass from the output shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tengrad_triton.capture.batch_statistics import PassFlags
from tengrad_triton.capture.record import Findings, Record
from tengrad_triton.capture.rows.proof import Cotangents
from tengrad_triton.capture.rows.weights import precision_of


class ThroughOutput:
    """Compares, within one backward pass of the caller, what goes through the output with what arrives.

    Args:
        flags: set during our own passes.
    """

    def __init__(self, flags: PassFlags) -> None:
        self._flags = flags
        self._beside: list[Tensor] = []
        self._expected: dict[int, Tensor | None] = {}
        self._arrived: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._findings: list[Findings] = []
        self._parameters: dict[int, Tensor] = {}
        self._pass = self._incomplete = -1

    def reached(
        self, record: Record, results: Sequence[Tensor], grads: Cotangents, parameters: Sequence[Tensor]
    ) -> None:
        """Find what goes through the output of one forward, and compare when the caller's backward pass ends.

        Args:
            record: of the forward.
            results: the tensors that its rows are derivatives of.
            grads: the derivatives of the caller's loss with respect to ``results``.
            parameters: those at which the gradients are compared.
        """
        # A user's hook on a parameter changes its gradient; what arrives before it cannot be seen.
        parameters = [p for p in parameters if not p._backward_hooks]
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        if not parameters or not pairs or torch.is_grad_enabled():  # a pass that makes a graph is not the last one
            return
        starts, cotangents = zip(*pairs, strict=True)
        through = torch.autograd.grad(starts, parameters, cotangents, retain_graph=True, allow_unused=True)
        if not self._findings:
            self._pass = torch._C._current_graph_task_id()
            torch.autograd.Variable._execution_engine.queue_callback(self._compare)
        self._findings.append(record.findings)
        for p, grad in zip(parameters, through, strict=True):
            if id(p) not in self._expected:
                self._handles.append(get_gradient_edge(p).node.register_prehook(self._arrival(id(p))))
            before = self._expected.get(id(p))
            self._expected[id(p)] = grad if before is None else before if grad is None else before + grad
        self._parameters = {id(p): p for p in parameters}

    def skip(self) -> None:
        """Compare nothing in the present pass: it goes through a forward that `reached` is not called for."""
        self._incomplete = torch._C._current_graph_task_id()

    def take(self) -> list[Tensor]:
        """Return the parameters to which some of the gradient came another way since the last call."""
        beside, self._beside = self._beside, []
        return beside

    def _arrival(self, key: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is not None and not grads[0].is_sparse and not self._flags.own.is_set:
                self._arrived[key] = grads[0].detach().clone()  # what accumulates it may write to it

        return hook

    def _compare(self) -> None:
        if self._incomplete == self._pass:  # a part of what arrived is that of a forward that is not checked
            self._clear_pass()
            return
        size = sum(float(grad.double().norm()) for grad in self._arrived.values())
        beside = [key for key, grad in self._arrived.items() if _differs(grad, self._expected[key], size)]
        self._beside += [self._parameters[key] for key in beside]
        for findings in self._findings if self._arrived else []:
            findings.all_through_output = findings.all_through_output is not False and not beside
        self._clear_pass()

    def _clear_pass(self) -> None:
        for handle in self._handles:
            handle.remove()
        for collection in (self._expected, self._arrived, self._handles, self._findings):
            collection.clear()


def _differs(arrived: Tensor, expected: Tensor | None, size_of_all: float) -> bool:
    """Whether two gradients differ by more than rounding errors; None stands for zero."""
    off = arrived if expected is None else arrived - expected
    size = arrived.norm() if expected is None else torch.maximum(arrived.norm(), expected.norm())
    eps = precision_of(arrived.dtype, arrived.device)
    return bool(torch.isfinite(size)) and bool(off.norm() > eps**0.5 * size + eps**0.75 * size_of_all)
