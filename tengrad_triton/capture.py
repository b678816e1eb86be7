"""What a refresh needs from one forward and backward pass: every layer's inputs and output derivatives, by hooks.

The hooks stand on the model only while a refresh is due. A forward without gradients passes them unseen; a forward that
no backward follows leaves nothing behind; copies and pickles of the model carry hooks that do nothing.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from tengrad_triton.fisher import Factorable, Fisher, Likelihood


@dataclass
class Use:
    """One call of a layer: its input, where its output stands in the graph, and what came back to it."""

    x: Tensor
    edge: GradientEdge | None
    version: int
    grad_y: Tensor | None = None

    def input(self, name: str) -> Tensor:
        """Return the input, unless something wrote into it since the forward."""
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of layer {name!r} was modified in place between its forward and optimizer.step(); "
                "step first, or give the model a copy"
            )
        return self.x


@dataclass
class Record:
    """One forward of the model: the number of samples, and every use of every layer in it.

    ``siblings`` are the same forward with the derivatives of further rows of each sample.
    """

    samples: int
    uses: dict[str, list[Use]] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    followed: bool = False
    siblings: list[Record] = field(default_factory=list)


class Capture:
    """Hooks on a model that record the forwards which a backward follows, for the layers named.

    Args:
        model: the module that the training loop calls, compiled or not.
        layers: the layers to record, by name.
        fisher: ``"sampled"`` takes the derivatives of the likelihood at labels drawn from the model's own output, in
            one extra backward pass that computes no parameter's gradient; ``"exact"`` takes those of every column of
            the likelihood's Hessian factor; ``"empirical"`` takes those of the loss.
        likelihood: where labels are drawn from.
        generator: draws them.
        opened: called when a forward begins that may be recorded; a method of an object that may go meanwhile.
        draws: how many labels are drawn for each sample.
        max_bytes: that the exact Hessian factor may take.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        fisher: Fisher,
        likelihood: Likelihood,
        generator: torch.Generator,
        opened: Callable[[], None] | None = None,
        draws: int = 1,
        max_bytes: float = math.inf,
    ) -> None:
        self._model = model
        self._layers = layers
        self._fisher = fisher
        self._likelihood = likelihood
        self._generator = generator
        self._opened = _Hook(opened) if opened is not None else lambda: None
        self._draws, self._max_bytes = draws, max_bytes
        self._open: Record | None = None
        self._handles: list[RemovableHandle] = []
        self._eager = contextlib.ExitStack()
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
        for name, layer in self._layers.items():
            hook = _Hook(self._after_layer, name)
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
            record.uses.clear()
            record.siblings.clear()
        self.records.clear()

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None
        if isinstance(model, OptimizedModule):
            # Compiled code does not see hooks that came after it; this one forward runs without compilation.
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_grad_enabled():
            self._opened()
            first = next(
                (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()), None
            )
            self._open = Record(samples=-1 if first is None else len(first))

    def _after_layer(self, name: str, layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        record = self._open
        if record is None or not isinstance(y, Tensor) or not y.requires_grad:
            return None
        # An in-place operation on a view would rewrite the graph behind the edge; a copy keeps it whole.
        replaced = y.clone() if y._is_view() else None
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)).detach()
        if len(x) == record.samples:
            use = Use(x, get_gradient_edge(y if replaced is None else replaced), x._version)
            record.uses.setdefault(name, []).append(use)
        else:
            record.misfits[name] = f"its input has {len(x)} rows where the batch has {record.samples}"
        return replaced

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._eager.close()
        record, self._open = self._open, None
        result = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if record is None or result is None:
            return
        _check_batch(record, result)
        self._look_for_strangers(record, result)
        if self._fisher == "empirical":
            _listen(record)
        else:
            self._derive(record, output)
        # The graph alone holds the record until a backward reaches it.
        result.register_hook(lambda grad: self._follow(record))

    def _derive(self, record: Record, output: Any) -> None:
        """Fill in the derivatives of every row: backward passes by the layers' outputs only."""
        edges = [use.edge for uses in record.uses.values() for use in uses]
        if not edges:
            return
        for index, grads in enumerate(self._rows_of(output, edges)):
            if index == 0:
                filled = record
            else:
                copies = {name: [Use(u.x, None, u.version) for u in uses] for name, uses in record.uses.items()}
                filled = Record(record.samples, copies, record.misfits)
                record.siblings.append(filled)
            for use, grad in zip((u for uses in filled.uses.values() for u in uses), grads, strict=True):
                use.grad_y, use.edge = grad, None

    def _rows_of(self, output: Any, edges: Sequence[Any]) -> Iterator[Sequence[Tensor | None]]:
        """Yield the derivatives by the layers' outputs, for one row of each sample at a time."""
        if self._fisher == "exact":
            _check_size(output, self._max_bytes)
            factor_RN = cast("Factorable", self._likelihood).factor(output)
            # F is the mean over all rows, of which each sample has len(factor).
            yield from batched_grads(output, edges, factor_RN * len(factor_RN) ** 0.5)
            return
        for _ in range(self._draws):
            target = self._likelihood.sample(tree_map_only(Tensor, Tensor.detach, output), self._generator)
            nll = self._likelihood.nll(output, target)
            yield torch.autograd.grad(nll, edges, retain_graph=True, allow_unused=True)

    def _look_for_strangers(self, record: Record, output: Tensor) -> None:
        """Note the layers whose parameters the graph reaches more often than the layers were called."""
        reached = _leaves_reached(output)
        for name, uses in record.uses.items():
            for label, parameter in self._layers[name].named_parameters(recurse=False):
                if reached[id(parameter)] > len(uses):
                    record.misfits[name] = f"its {label} is used outside of it too"

    def _follow(self, record: Record) -> None:
        if self.armed and not record.followed:
            record.followed = True
            self.records += [record, *record.siblings]

    def rows(self) -> Iterator[tuple[str, list[list[tuple[Tensor, Tensor]]]]]:
        """Yield every layer recorded in all forwards: for each forward, (x, grad_y) of each use.

        ``grad_y`` is the derivative of each sample's own loss. Where it comes from a mean loss it is multiplied by the
        number of samples of all forwards, because the gradient of the step is the mean over all of them.
        """
        samples = sum(record.samples for record in self.records)

        def own(grad_y: Tensor) -> Tensor:
            return samples * grad_y if self._fisher == "empirical" else grad_y

        for name in self._layers:
            forwards = [
                [(u.input(name), own(u.grad_y)) for u in record.uses.get(name, []) if u.grad_y is not None]
                for record in self.records
            ]
            if forwards and all(forwards) and not any(name in record.misfits for record in self.records):
                yield name, forwards

    def why_missing(self, name: str) -> str:
        """Return why `rows` does not yield a layer."""
        misfits = (record.misfits[name] for record in self.records if name in record.misfits)
        return next(misfits, "not called by the model's forward")


def _check_size(output: Tensor, max_bytes: float) -> None:
    rows = output[0].numel()
    needed = rows * output.numel() * output.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"fisher='exact' takes {rows} rows for each of {len(output)} samples: {needed / 2**30:.2f} GiB for the "
            f"derivatives by the outputs alone, where max_bytes allows {max_bytes / 2**30:.2f} GiB: use "
            "fisher='sampled' with fisher_samples=, or raise max_bytes"
        )


def batched_grads(output: Tensor, edges: Sequence[Any], cotangents_RN: Tensor) -> Iterator[Sequence[Tensor | None]]:
    """Yield the derivatives of ⟨cotangent, output⟩ for each cotangent: one backward pass for all, where torch can."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        batched = torch.autograd.grad(output, edges, cotangents_RN, is_grads_batched=True, **options)
    except RuntimeError:  # an operation that has no rule for a batch of backward passes, or too little memory
        for cotangent in cotangents_RN:
            yield torch.autograd.grad(output, edges, cotangent, **options)
        return
    for row in range(len(cotangents_RN)):
        yield [None if grads is None else grads[row] for grads in batched]


def _leaves_reached(output: Tensor) -> Counter[int]:
    """Count how many edges of the graph behind ``output`` end in each leaf, by the leaf's id."""
    reached: Counter[int] = Counter()
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for successor, _ in node.next_functions:
            leaf = getattr(successor, "variable", None)
            if leaf is not None:
                reached[id(leaf)] += 1
            else:
                stack.append(successor)
    return reached


def _listen(record: Record) -> None:
    """Have the backward of the loss leave each layer's output derivative in the record."""

    def keep(use: Use, index: int) -> Callable[[Any], None]:
        def hook(grads: Any) -> None:
            grad = grads[index]
            if grad is not None:
                # The very tensor, not a detached one: autograd lends a gradient on only while nobody else holds it.
                own = grad.detach() if grad.requires_grad else grad
                use.grad_y = own if use.grad_y is None else use.grad_y + own

        return hook

    for uses in record.uses.values():
        for use in uses:
            edge, use.edge = use.edge, None
            if edge is not None:
                edge.node.register_prehook(keep(use, edge.output_nr))


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
