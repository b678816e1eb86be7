"""What a refresh needs from one forward and backward pass: every layer's inputs and output derivatives, by hooks.

The hooks stand on the model only while a refresh is due. A forward without gradients passes them unseen; a forward that
no backward follows leaves nothing behind; copies and pickles of the model carry hooks that do nothing.
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
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from tengrad_triton.capture.batch_statistics import frozen
from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.output_grads import OutputGrads
from tengrad_triton.capture.record import LayerCall, Record
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
)
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.profiling import phase


class Capture:
    """Hooks on a model that record the forwards which a backward follows, for the layers named.

    Args:
        model: the module that the training loop calls, compiled or not.
        sources: the layers to record, by name, and the parameters whose rows their calls describe.
        fisher: ``"sampled"`` takes the derivatives of the likelihood at labels drawn from the model's own output, in
            one extra backward pass that computes no parameter's gradient; ``"exact"`` takes those of every column of
            the likelihood's Hessian factor; ``"empirical"`` takes those of the loss.
        likelihood: where labels are drawn from.
        generator: draws them.
        opened: called when a forward begins that may be recorded; a method of an object that may go meanwhile.
        draws: how many labels are drawn for each sample.
        max_bytes: that the exact Hessian factor may take, and the rows of any one parameter without a rule.
        unattributed_too: whether parameters that are used outside of their layers get rows, by a backward pass a sample.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, CapturedLayer],
        fisher: Fisher,
        likelihood: Likelihood,
        generator: torch.Generator,
        opened: Callable[[], None] | None = None,
        draws: int = 1,
        max_bytes: float = math.inf,
        unattributed_too: bool = False,
    ) -> None:
        self._model = model
        self._sources = sources
        self._sequence_first = any(samples_dim(source.layer) == 1 for source in sources.values())
        self._fisher = fisher
        module = getattr(model, "_orig_mod", model)
        self._deriving = OutputGrads(module, sources, fisher, likelihood, generator, draws, max_bytes, unattributed_too)
        self._opened = _Hook(opened) if opened is not None else lambda: None
        self._open: Record | None = None
        self._handles: list[RemovableHandle] = []
        self._eager = contextlib.ExitStack()
        self._rng: dict[str, Tensor] = {}
        self.records: list[Record] = []

    @property
    def armed(self) -> bool:
        """Whether the hooks stand on the model."""
        return bool(self._handles)

    def arm(self) -> None:
        """Put the hooks on the model, in front of everyone else's."""
        if self.armed:
            return
        pre, post = _Hook(self._before_model), _Hook(self._after_model)
        self._handles = [
            self._model.register_forward_pre_hook(pre, with_kwargs=True),
            self._model.register_forward_hook(post, with_kwargs=True, always_call=True),
        ]
        for name, source in self._sources.items():
            hook = _Hook(self._after_layer, name)
            self._handles.append(source.layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
            if may_draw_random_numbers(source.layer):
                before = _Hook(self._before_layer, name)
                self._handles.append(source.layer.register_forward_pre_hook(before))
        for layer in filter(may_mix_samples, getattr(self._model, "_orig_mod", self._model).modules()):
            hook = _Hook(self._after_mixing)
            self._handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def disarm(self) -> None:
        """Take the hooks off the model and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded. The graph of an output that is still around holds the records: empty them."""
        for record in self.records:
            record.clear()
        self.records.clear()

    # The hooks, in the order in which they are called

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None
        if isinstance(model, OptimizedModule):
            # Compiled code does not see hooks that came after it; this one forward runs without compilation.
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_grad_enabled() and not self._deriving.busy:
            self._opened()
            first = next(
                (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()), None
            )
            call = Call(*tree_map_only(Tensor, Tensor.detach, (args, kwargs)))
            self._open = Record(-1 if first is None else len(first), call)

    def _before_layer(self, name: str, layer: nn.Module, args: Any) -> None:
        if self._open is not None and draws_random_numbers(layer):
            self._rng[name] = rng_state(next(layer.parameters()).device)

    def _after_mixing(self, layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        if self._open is None or not y.requires_grad or not mixes_samples(layer):
            return None
        x = first_tensor(args, kwargs)
        self._open.mixes_samples = True
        return frozen(x, y, statistics_scale(layer, x), self._deriving.switch)

    def _after_layer(self, name: str, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        record = self._open
        outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
        if record is None or not any(leaf.requires_grad for leaf in outputs):
            return None
        # An in-place operation on a view would rewrite the graph behind the edge; a copy keeps it whole.
        views = any(leaf._is_view() for leaf in outputs)
        replaced = tree_map_only(Tensor, Tensor.clone, y) if views else y
        edges = [
            get_gradient_edge(leaf) if leaf.requires_grad else None
            for leaf in tree_leaves(replaced)
            if isinstance(leaf, Tensor)
        ]
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        call, swapped = Call(args, kwargs, self._rng.pop(name, None)), False
        if not self._sources[name].rerun:
            why, swapped = locate_samples(layer, outputs[0], record.samples, self._sequence_first)
            if why:
                record.unbatched[name] = why
        record.calls.setdefault(name, []).append(
            LayerCall(call, edges, isinstance(y, Tensor), swapped, tuple(outputs[0].shape))
        )
        return replaced if views else None

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._eager.close()
        record, self._open = self._open, None
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if record is None or not results:
            return
        _check_batch(record, results[0])
        with self._deriving.suspended(), phase("capture"):
            self._deriving.find_mixing(record, results)
            self._deriving.find_unattributed(record, results)
            if self._fisher == "empirical":
                self._deriving.listen(record, results)
            else:
                self._deriving.derive(record, output, results)
        # The graph alone holds the record until a backward reaches it.
        results[0].register_hook(lambda grad: self._follow(record))

    def _follow(self, record: Record) -> None:
        if self.armed and not record.backward_seen:
            record.backward_seen = True
            self.records += [record, *record.extra_draws]

    # What was found

    @property
    def layers(self) -> Mapping[str, CapturedLayer]:
        """Return the layers that are recorded."""
        return self._sources

    @property
    def scale(self) -> int:
        """Return by what the derivatives have to be multiplied to be those of each sample's own loss.

        Where they come from a mean loss that is the number of samples of all forwards, because the gradient of the step
        is the mean over all of them.
        """
        return sum(record.samples for record in self.records) if self._fisher == "empirical" else 1

    def complete(self) -> None:
        """Find the rows of layers without a rule where the loss's own backward has left the derivatives."""
        if self._fisher == "empirical":
            with self._deriving.suspended():
                for record in self.records:
                    self._deriving.rerun(record)


def _check_batch(record: Record, output: Tensor) -> None:
    samples = len(output) if output.dim() else 0
    if record.samples < 0:
        record.samples = samples
    if samples != record.samples:
        raise ValueError(
            f"the model's output has {samples} rows where its input has {record.samples}: TENGraD needs one output row "
            "a sample, along the first dimension"
        )


class _Hook:
    """A hook for this model only: copies and pickles of the model get one that does nothing."""

    def __init__(self, method: Callable[..., Any], *bound: Any) -> None:
        self._method = weakref.WeakMethod(method)
        self._bound = bound

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*self._bound, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        # The exit of a null context takes any arguments and returns None; it unpickles without this package.
        return getattr, (contextlib.nullcontext(), "__exit__")
