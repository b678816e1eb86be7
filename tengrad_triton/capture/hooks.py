"""Hooks on a model that record, while a refresh is due, every layer's inputs and output gradients.

The optimizer arms the hooks when its next step refreshes the curvature (`optim/base.py`). In a forward and a backward,
this happens in this order:

1. `_before_model` opens a `Record`, unless gradients are disabled or the forward is one of our own.
2. `_before_layer` stores the random number generator's state for layers whose rule repeats their dropout.
3. `_after_batch_norm` adds a backward pass with detached statistics to the output of a batch norm in training.
4. `_after_layer` adds a `LayerCall` to the record: the inputs, and the edges of the outputs in the graph. An edge names
   a tensor's place in the graph: `torch.autograd.grad` takes it in place of the tensor, which need not be kept.
5. `_after_model` finds the unattributed parameters: there are none where parameters are used in calls of their layers
   only, each with one entry for each sample. For shapes that were not seen before, this takes two backward passes. Then
   `OutputGrads` computes the output gradients, or `LossGrads` attaches hooks that copy those of the caller's loss. From
   here on only the graph of the output refers to the record, so the record of a forward without a backward is freed
   together with its graph.
6. `_backward_reached` runs when the caller's backward begins, and moves the record to `Capture.records`.

After the backward, `Capture.find_remaining_rows` finds the rows that need all of it. The hooks of copies and pickles of
the model do nothing.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from tengrad_triton.capture.attribution import Attribution
from tengrad_triton.capture.batch_statistics import with_detached_statistics
from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.explicit_rows import ExplicitRows
from tengrad_triton.capture.flag import ScopedFlag
from tengrad_triton.capture.loss_grads import LossGrads
from tengrad_triton.capture.output_grads import OutputGrads
from tengrad_triton.capture.record import UNKNOWN, LayerCall, Record
from tengrad_triton.layers import (
    Call,
    draws_random_numbers,
    first_tensor,
    locate_samples,
    may_draw_random_numbers,
    may_mix_samples,
    mixes_samples,
    rng_state,
    samples_dim,
    statistics_scale,
    tensors_in,
)
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.profiling import phase


class Capture:
    """Records, while armed, every forward that a backward follows, by hooks on the model and its layers.

    Args:
        model: the module that the training loop calls, compiled or not.
        layers: the layers to record, by name, and the parameters whose rows their calls give.
        fisher: the rows of J. ``"sampled"``: derivatives of the likelihood at labels drawn from the model's own output;
            they take one more backward pass. ``"exact"``: derivatives for every column of the likelihood's Hessian
            factor (M9). ``"empirical"``: derivatives of the caller's loss.
        likelihood: the distribution from which labels are drawn.
        generator: the random number generator that draws the labels.
        on_forward: a bound method that is called when a recorded forward begins, or None; `TENGraD` frees the old J
            there. Only a weak reference to its object is kept.
        draws: how many labels are drawn for each sample.
        max_hessian_factor_bytes: the most bytes that the exact Hessian factor may take.
        max_parameter_bytes: the most bytes that the rows of one parameter without a rule may take.
        include_unattributed: whether to find the rows of unattributed parameters.

    Attributes:
        layers: the argument ``layers``.
        records: the recorded forwards that a backward has reached, in the order of the backwards. If a sample has
            several rows, its forward has one record for each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, CapturedLayer],
        fisher: Fisher,
        likelihood: Likelihood,
        generator: torch.Generator,
        *,
        on_forward: Callable[[], None] | None = None,
        draws: int = 1,
        max_hessian_factor_bytes: float = math.inf,
        max_parameter_bytes: float = math.inf,
        include_unattributed: bool = False,
    ) -> None:
        self._model, self._module = model, getattr(model, "_orig_mod", model)
        self.layers = layers
        self.records: list[Record] = []
        self._sequence_first = any(samples_dim(captured.layer) == 1 for captured in layers.values())
        self._fisher = fisher
        self._on_forward = _Hook(on_forward) if on_forward is not None else lambda: None
        self._suspended, self._detached_statistics = ScopedFlag(), ScopedFlag()
        self._attribution = Attribution(layers, self._detached_statistics, max_parameter_bytes)
        rows = ExplicitRows(self._module, self._attribution, include_unattributed)
        self._grads: LossGrads | OutputGrads
        if fisher == "empirical":
            self._grads = LossGrads(rows, self._detached_statistics, self._suspended)
        else:
            sampling = (likelihood, generator, draws, max_hessian_factor_bytes)
            self._grads = OutputGrads(fisher, *sampling, rows, self._detached_statistics)
        self._open: Record | None = None  # of the forward that is running
        self._handles: list[RemovableHandle] = []
        self._eager = contextlib.ExitStack()
        self._rng_states: dict[str, Tensor] = {}

    @property
    def armed(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def arm(self) -> None:
        """Attach the hooks. Forward hooks on layers run before other forward hooks of the same layer."""
        if self.armed:
            return
        pre, post = _Hook(self._before_model), _Hook(self._after_model)
        self._handles = [
            self._model.register_forward_pre_hook(pre, with_kwargs=True),
            self._model.register_forward_hook(post, with_kwargs=True, always_call=True),
        ]
        for name, captured in self.layers.items():
            hook = _Hook(self._after_layer, name)
            self._handles.append(captured.layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            if may_draw_random_numbers(captured.layer):
                before = _Hook(self._before_layer, name)
                self._handles.append(captured.layer.register_forward_pre_hook(before))
        for layer in filter(may_mix_samples, self._module.modules()):
            hook = _Hook(self._after_batch_norm)
            self._handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def disarm(self) -> None:
        """Remove the hooks and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded; the records are emptied, because a graph may still hold them."""
        for record in self.records:
            record.clear()
        self.records.clear()

    def find_remaining_rows(self) -> None:
        """Find the rows that need the whole backward; call this once after it and before reading ``records``.

        Only the empirical Fisher has such rows, for parameters without a rule.
        """
        with self._suspended.set():
            for record in self.records:
                self._grads.find_remaining_rows(record)

    @property
    def scale(self) -> int:
        """Return the number by which to multiply the output gradients to get those of each sample's own loss.

        The caller's loss is a mean. So for the empirical Fisher this is the number of samples of all forwards together.
        """
        return sum(record.samples for record in self.records) if self._fisher == "empirical" else 1

    # The hooks, in the order in which they are called

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None
        if isinstance(model, OptimizedModule):
            # Compiled code ignores hooks that were added later, so this one forward runs without compilation.
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_grad_enabled() and not self._suspended.is_set:
            self._on_forward()
            batch = next((x for x in tensors_in((args, kwargs)) if x.dim()), None)
            call = Call(*tree_map_only(Tensor, Tensor.detach, (args, kwargs)))
            self._open = Record.of_forward(UNKNOWN if batch is None else len(batch), call)

    def _before_layer(self, name: str, layer: nn.Module, args: Any) -> None:
        if self._open is not None and draws_random_numbers(layer):
            self._rng_states[name] = rng_state(next(layer.parameters()).device)

    def _after_batch_norm(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        if self._open is None or not y.requires_grad or not mixes_samples(layer):
            return None
        x = first_tensor(args, kwargs)
        self._open.mixes_samples = True
        return with_detached_statistics(x, y, statistics_scale(layer, x), self._detached_statistics)

    def _after_layer(self, name: str, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        record, outputs = self._open, tensors_in(y)
        if record is None or not any(output.requires_grad for output in outputs):
            return None
        # An in-place operation on a view would change the graph at the recorded edge. On a clone, or on an output that
        # is no view, it does not.
        has_views = any(output._is_view() for output in outputs)
        returned = tree_map_only(Tensor, Tensor.clone, y) if has_views else y
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        call, samples_second = Call(args, kwargs, self._rng_states.pop(name, None)), False
        if self.layers[name].has_rule:
            # For a layer whose output has the samples first, this is (None, False).
            why_not, samples_second = locate_samples(layer, outputs[0], record.samples, self._sequence_first)
            if why_not:
                record.unbatched[name] = why_not
        record.calls.setdefault(name, []).append(LayerCall.of_forward(call, returned, samples_second))
        return returned if has_views else None

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._eager.close()
        record, self._open = self._open, None
        results = [result for result in tensors_in(output) if result.requires_grad]
        if record is None or not results:
            return
        _check_batch(record, results[0])
        with self._suspended.set(), phase("capture"):
            self._attribution.check(record, results)
            self._grads.after_forward(record, output, results)
        # From here on only the graph refers to the record, until a backward reaches it.
        results[0].register_hook(lambda grad: self._backward_reached(record))

    def _backward_reached(self, record: Record) -> None:
        if self.armed and not record.backward_seen:
            record.backward_seen = True
            self.records += [record, *record.extra_records]  # from here on, a further row is like a further sample


def _check_batch(record: Record, output: Tensor) -> None:
    samples = len(output) if output.dim() else 0
    if record.samples == UNKNOWN:
        record.samples = samples
    if samples != record.samples:
        raise ValueError(
            f"the model returned {samples} samples for an input of {record.samples}: return one output for each "
            "sample, along the first dimension"
        )


class _Hook:
    """A hook that keeps only a weak reference to its object, and does nothing on copies and pickles of the model."""

    def __init__(self, method: Callable[..., Any], *bound: Any) -> None:
        self._method = weakref.WeakMethod(method)
        self._bound = bound

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*self._bound, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        # The exit of a null context takes any arguments and returns None; it unpickles without this package.
        return getattr, (contextlib.nullcontext(), "__exit__")
