"""Hooks on a model that record, while a refresh is due, every layer's inputs and output gradients.

The optimizer arms the hooks when its next step refreshes the curvature (`optim/base.py`). In a forward and a backward,
this happens in this order:

1. `_before_model` opens a `Record`, unless gradients are disabled, the forward is one of our own, or `torch.func` or an
   export traces it.
2. `_before_layer` stores the random number generator's state for layers whose rule repeats their dropout.
3. `_after_batch_norm` adds a backward pass with detached statistics to the output of a batch norm in training.
4. `_after_layer` adds a `LayerCall` to the record: the inputs, and the edges of the outputs in the graph. An edge names
   a tensor's place in the graph: `torch.autograd.grad` takes it in place of the tensor, which need not be kept.
5. `_after_model` finds the unattributed parameters: there are none where parameters are used in calls of their layers
   only, each with one entry for each sample. Then `LikelihoodGrads` computes the output gradients, or `LossGrads`
   attaches hooks that copy those of the caller's loss. Where a structure of the model is new, the rows are compared
   with autograd (`rows/proof.py`). From here on only the graph of the output refers to the record, so the record of a
   forward without a backward is freed together with its graph.
6. `_on_backward` runs when a backward pass of the caller gets to the model's output. As soon as that pass has added to
   a ``.grad``, the record counts (`counted.py`). The hooks of copies and pickles of the model do nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from tengrad_triton.capture.batch_statistics import PassFlags, with_detached_statistics
from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.counted import CountedRecords
from tengrad_triton.capture.hook import Hook, check_not_checkpointed, forget_retained, is_transformed, note_retained
from tengrad_triton.capture.likelihood_grads import LikelihoodGrads
from tengrad_triton.capture.loss_grads import LossGrads, loss_cotangents
from tengrad_triton.capture.options import CaptureOptions
from tengrad_triton.capture.output_grads import OutputGrads
from tengrad_triton.capture.outputs import Seen, call_on_backward, constants_of, count_samples, differentiable
from tengrad_triton.capture.record import LayerCall, Record
from tengrad_triton.capture.rows.attribution import Attribution
from tengrad_triton.capture.rows.explicit import ExplicitRows
from tengrad_triton.capture.rows.used import UsedParameters
from tengrad_triton.capture.through_output import ThroughOutput
from tengrad_triton.layers import (
    Call,
    draws_random_numbers,
    first_tensor,
    may_draw_random_numbers,
    may_mix_samples,
    mixes_samples,
    rng_state,
    tensors_in,
)
from tengrad_triton.profiling import phase


class Capture:
    """Records, while armed, every forward that a backward follows, by hooks on the model and its layers.

    Args:
        model: the module that the training loop calls, compiled or not.
        layers: the layers to record, by name, and the parameters whose rows their calls give.
        options: which rows to record.
        generator: the random number generator that draws the labels.
        on_forward: a bound method, called when a recorded forward begins. It may call `follow`; weakly referred to.

    Attributes:
        layers: the argument ``layers``, with the parameters that the last forward used.
        used: finds these parameters.
        through_output: whether the caller's gradient came through the output of the rows only.
        was_empty: whether the batch of the last recorded forward had no samples.
        loss_samples: the samples that the caller's loss is a mean of: N / R with N in R processes; None: the records'.
        loss_scale: the number that a `GradScaler` has multiplied the caller's loss by; None if it is not known.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, CapturedLayer], options: CaptureOptions,
        generator: torch.Generator, on_forward: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._module = model, getattr(model, "_orig_mod", model)
        self.layers, self.used = layers, UsedParameters(self._module, layers)
        self._options, self.was_empty = options, False
        self.loss_scale, self.loss_samples = cast("float | None", 1.0), cast("float | None", None)
        self._on_forward = Hook(on_forward) if on_forward is not None else lambda: None
        self._flags, self._counted = PassFlags(), CountedRecords()
        self.through_output = ThroughOutput(self._flags)
        self._attribution = Attribution(layers, options.max_bytes, options.verify)
        rows = ExplicitRows(self._module, self._attribution, options.include_unattributed)
        output_grads = OutputGrads(self._attribution, rows, self._flags)
        self._of_loss = LossGrads(output_grads, rows, self._flags.own)
        of_likelihood = (options.fisher, options.likelihood, generator, options.draws, options.max_bytes)
        self._of_likelihood = LikelihoodGrads(output_grads, *of_likelihood)
        self._open: Record | None = None  # of the forward that is running
        self._handles, self._layer_handles = list[RemovableHandle](), list[RemovableHandle]()
        self._eager, self._rng_states = contextlib.ExitStack(), dict[str, Tensor]()

    @property
    def armed(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    @property
    def records(self) -> list[Record]:
        """Return the records of the forwards that count, in the order of their backwards (`CountedRecords`)."""
        return self._counted.records

    def arm(self) -> None:
        """Attach the hooks. Forward hooks on layers run before other forward hooks of the same layer."""
        if self.armed:
            return
        pre, post = Hook(self._before_model), Hook(self._after_model)
        self._handles = [
            self._model.register_forward_pre_hook(pre, with_kwargs=True),
            self._model.register_forward_hook(post, with_kwargs=True, always_call=True),
        ]
        self._attach_to_layers()
        note_retained(self)

    def _attach_to_layers(self) -> None:
        handles = self._layer_handles
        for name, captured in self.layers.items():
            hook = Hook(self._after_layer, name)
            handles.append(captured.layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            if may_draw_random_numbers(captured.layer):
                handles.append(captured.layer.register_forward_pre_hook(Hook(self._before_layer, name)))
        for layer in filter(may_mix_samples, self._module.modules()):
            hook = Hook(self._after_batch_norm)
            handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def _detach_from_layers(self) -> None:
        for handle in self._layer_handles:
            handle.remove()
        self._layer_handles.clear()

    def disarm(self) -> None:
        """Remove the hooks and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None
        self._detach_from_layers()
        forget_retained(self)
        self.forget()

    def follow(self, layers: Mapping[str, CapturedLayer]) -> None:
        """Record other layers from now on: the model has changed. What was recorded is forgotten."""
        self.layers = self.used.layers = layers
        self.forget()
        self._attribution.follow(layers)
        if self.armed:
            self._detach_from_layers()
            self._attach_to_layers()

    def forget(self) -> None:
        """Forget what was recorded; the records are emptied, because a graph may still hold them."""
        self._counted.forget()
        self._attribution.refresh += 1

    def take_back(self) -> None:
        """Forget what was recorded, and draw the labels of the next batch from where those of this one began."""
        self._of_likelihood.take_back(self.records)
        self.forget()

    def check_counted(self) -> None:
        """Raise `ValueError` if a record that counts has no rows, because the loss is made of derivatives."""
        if self._options.fisher == "empirical":
            self._counted.check_loss_seen()

    def why_loss_differs(self) -> str | None:
        """Return why the caller's loss is not the mean of the likelihood's negative logarithm, as far as is known."""
        if self._options.fisher == "empirical" or self.loss_scale is None:
            return None
        return self._counted.why_loss_differs((self.loss_samples or self.samples) / self.loss_scale)

    @property
    def samples(self) -> int:
        """Return the number of samples of all forwards that count."""
        return sum(record.samples for record in self.records if not record.is_extra)

    @property
    def reads_loss(self) -> bool:
        """Whether the rows of the recorded batches are derivatives of the caller's loss."""
        return self._options.fisher == "empirical" and bool(self.records)

    @property
    def scale(self) -> float:
        """Return the number by which to multiply the output gradients to get those of each sample's own loss.

        The caller's loss is a mean. So for the empirical Fisher this is the number of samples of all forwards together.
        """
        return (self.loss_samples or self.samples) / (self.loss_scale or 1.0) if self.reads_loss else 1

    # The hooks, in the order in which they are called

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None
        if is_transformed():
            return
        if isinstance(model, OptimizedModule):
            # Compiled code ignores hooks that were added later, so this one forward runs without compilation.
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_grad_enabled() and not self._flags.own.is_set:
            check_not_checkpointed()
            self._counted.drop_cleared()
            self._on_forward()
            self.used.before_forward()
            self._open = Record(Call(*tree_map_only(Tensor, Tensor.detach, (args, kwargs))))

    def _before_layer(self, name: str, layer: nn.Module, args: Any) -> None:
        if self._open is not None and draws_random_numbers(layer):
            self._rng_states[name] = rng_state(next(layer.parameters()).device)

    def _after_batch_norm(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        # A checkpointed part runs again within the backward pass, and has to save the same tensors.
        again = torch._C._current_graph_task_id() >= 0 and not is_transformed()
        if not (self._open is not None or again) or not y.requires_grad or not mixes_samples(layer):
            return None
        if self._open is not None:
            self._open.mixes_samples = True
        return with_detached_statistics(layer, first_tensor(args, kwargs), y, self._flags)

    def _after_layer(self, name: str, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        record, outputs = self._open, tensors_in(y)
        if record is None or not any(output.requires_grad for output in outputs):
            return None
        # An in-place operation on a view would change the graph at the recorded edge; on a clone it does not.
        has_views = any(output._is_view() for output in outputs)
        returned = tree_map_only(Tensor, Tensor.clone, y) if has_views else y
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        call = Call(args, kwargs, self._rng_states.pop(name, None))
        record.calls.setdefault(name, []).append(LayerCall.of_forward(call, returned))
        return returned if has_views else None

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._eager.close()
        record, self._open = self._open, None
        if record is None:
            return None
        with self.used.after_forward() as layers:
            if layers is not None:
                self.layers, self._counted.parts = layers, self.used.parts
                self._attribution.follow(layers)
            starts, counts = self._rows_of_likelihood(record, output, (args, kwargs))
        results = differentiable(output) or starts
        if not results or (not counts and self.used.are_whole):
            return None
        # From here on only the graph refers to the record, until a backward reaches it.
        callback = Hook(self._on_backward, record if counts else None, constants_of(output))
        return call_on_backward(output, results, callback)

    def _rows_of_likelihood(self, record: Record, output: Any, inputs: Any) -> tuple[Sequence[Tensor], bool]:
        """Return the tensors of an output that rows are derivatives of, and whether its record may count."""
        likelihood = None if self._options.fisher == "empirical" else self._options.likelihood
        seen = Seen(self._options.output, likelihood)
        selected = seen.part_of(output)
        if not (starts := differentiable(selected)):
            return starts, False
        record.samples, record.pick = count_samples(starts, inputs), seen.tensors_of
        self.was_empty = not record.samples
        if self.was_empty:
            return starts, False
        with self._flags.ours(), self.used.kept(), phase("capture"):
            if not self._attribution.check(record, starts):
                return starts, False
            if likelihood is None:
                self._of_loss.after_forward(record)
            else:
                self._of_likelihood.after_forward(record, selected, starts)
                if record.proves and isinstance(selected, Tensor):  # its targets may be those of this batch
                    record.seen = (copy.copy(likelihood), selected.detach())
        return starts, True

    def _on_backward(
        self, record: Record | None, output: Any, results: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> None:
        """Handle a backward pass of the caller; ``grads`` are the derivatives with respect to ``results``."""
        if not self.armed or self._flags.own.is_set:
            return
        self.used.gather()  # on every rank, whatever its passes are
        if record is None:
            return
        trained = self._attribution.trained()
        self._counted.reached(record, trained, record.undo())
        grads = [None if grad is None else grad.detach() for grad in grads]
        record.loss_seen = True
        if not record.proves:
            self.through_output.skip()
        if not record.own_pass and not record.proves:
            return
        with self._flags.ours(), self.used.kept():
            starts, cotangents = loss_cotangents(record, output, results, grads)
            record.add_cotangents(cotangents)
            if record.proves:
                self.through_output.reached(record, starts, cotangents, trained)
            if self._options.fisher == "empirical":
                self._of_loss.on_backward(record, starts)
