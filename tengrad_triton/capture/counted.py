"""Which forwards count: those whose gradients are in the parameters' ``.grad``.

A forward counts as soon as a backward pass that went through its output has added to a parameter's ``.grad``. It
counts until that ``.grad`` is cleared, whoever clears it. A derivative with respect to an input adds to no ``.grad``.
If it has a graph of its own (``create_graph=True``), its forward counts with the next backward pass: a loss of
derivatives need not pass through the output again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import TensorWeakRef

from tengrad_triton.capture.hook import Hook
from tengrad_triton.capture.loss_grads import as_rounded
from tengrad_triton.capture.record import Record
from tengrad_triton.likelihoods import why_loss_differs


@dataclass
class _ShardWitness:
    """A parameter of which this rank has a part, whose ``.grad`` is there at the end of a backward pass at the latest.

    Its entries are not read: ranks must decide alike.
    """

    parameter: Tensor
    was_seen: bool = False

    def is_cleared(self, in_backward: bool) -> bool:
        """Whether the parameter's ``.grad`` has been cleared since it was there."""
        if self.parameter.grad is None:
            return self.was_seen
        self.was_seen = True
        return False


@dataclass
class _Witness:
    """A parameter, its ``.grad`` after a backward pass, and the version of that tensor."""

    parameter: Tensor
    grad: TensorWeakRef
    version: int

    def is_cleared(self, in_backward: bool) -> bool:
        """Whether the parameter's ``.grad`` has been cleared since.

        Within a backward pass, which may have filled it again already, another tensor is a sign of that.
        """
        present = self.parameter.grad
        if present is None or (present is self.grad() and present._version == self.version):
            return present is None
        return (in_backward and present is not self.grad()) or not bool(present.any())


class CountedRecords:
    """The records of the forwards that count, in the order of their backward passes.

    Attributes:
        records: these records. If a sample has several rows, its forward has one record for each of them.
        parts: for whole parameters of a sharded model, by id, those that keep the gradients.
    """

    def __init__(self) -> None:
        self.parts: Mapping[int, Tensor] = {}
        self.records: list[Record] = []
        # Those that the present backward pass has reached, with what to call if it adds to no `.grad`.
        self._present: list[tuple[Record, Callable[[], None]]] = []
        self._pass, self._has_added = -1, False
        self._differentiated: list[weakref.ref[Record]] = []  # alive while their graph is
        self._witnesses: dict[int, _Witness | _ShardWitness] = {}  # by the parameter's id

    def forget(self) -> None:
        """Forget all records; they are emptied, because a graph may still hold them."""
        for record in self.records:
            record.clear()
        self.records.clear()
        self._witnesses.clear()

    def check_loss_seen(self) -> None:
        """Raise `ValueError` if a record has no derivative of the loss with respect to the model's output."""
        if not all(record.loss_seen for record in self.records):
            raise ValueError(
                "fisher='empirical' takes rows from the derivative of the loss with respect to the model's output, but "
                "this loss depends on derivatives of the output only: return from the model's forward what the loss is "
                "a mean over, or use fisher='sampled' or 'exact'"
            )

    def why_loss_differs(self, factor: float) -> str | None:
        """Return why the caller's loss is not the mean of the likelihood's negative logarithm, as far as is known.

        Only forwards whose rows are compared with autograd show it. ``factor`` gives each sample's own loss.
        """
        for record in self.records:
            if record.seen is not None and record.cotangents is not None and record.cotangents[0] is not None:
                why = why_loss_differs(*record.seen, as_rounded(record.cotangents[0]) * factor)
                if why is not None:
                    return why
        return None

    def reached(self, record: Record, parameters: Sequence[Tensor], undo: Callable[[], None]) -> None:
        """Note that the present backward pass has reached the output of a forward.

        Args:
            record: of that forward.
            parameters: those whose ``.grad`` counts.
            undo: called at the end of the pass if it has added to no ``.grad``.
        """
        self.drop_cleared(in_backward=True)
        present = torch._C._current_graph_task_id()
        if present != self._pass:  # the last pass may have ended with an error
            self._pass, self._present, self._has_added = present, [], False
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)
            # These nodes of the graph add to a `.grad`. A hook on the parameter itself does not survive `swap_tensors`.
            for parameter in parameters:
                hook = Hook(self._accumulated, parameter)
                get_gradient_edge(parameter).node.register_hook(hook)  # it lives as long as the graph
        self._present.append((record, undo))
        if torch.is_grad_enabled():  # this backward pass makes a graph, of which a loss may be made
            self._differentiated.append(weakref.ref(record))
            record.own_pass = record.proves = True

    def _ended(self) -> None:
        present, self._present = self._present, []
        for _, undo in present if not self._has_added else []:
            undo()

    def drop_cleared(self, in_backward: bool = False) -> None:
        """Forget the records whose gradients were cleared; called before a forward, and as a backward pass begins."""
        if self._witnesses and all(witness.is_cleared(in_backward) for witness in self._witnesses.values()):
            self.forget()

    def _accumulated(self, parameter: Tensor, *_: Any) -> None:
        """Note that a backward pass has added to a parameter's ``.grad``."""
        self._has_added = True
        derived = [record for ref in self._differentiated if (record := ref()) is not None]
        for record in (*(record for record, _ in self._present), *derived):
            if not record.backward_seen:
                record.backward_seen = True
                self.records += [record, *record.extra_records]  # from here on, a further row is like a further sample
        self._differentiated.clear()
        grad, part = parameter.grad, self.parts.get(id(parameter))
        if part is not None and self.records:
            self._witnesses.setdefault(id(parameter), _ShardWitness(part, part.grad is not None))
        elif grad is not None and self.records:
            self._witnesses[id(parameter)] = _Witness(parameter, TensorWeakRef(grad), grad._version)
