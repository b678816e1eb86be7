"""What the model returned: its tensors, the part that the likelihood sees, the number of samples, and a callback."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tengrad_triton.layers import tensors_in
from tengrad_triton.likelihoods import Reparametrized

Select = Callable[[Any], Any] | str | int | None
"""Which part of the model's output the likelihood sees: a function of the output, a key or name, an index, or None."""
Callback = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
"""Takes the tensors that the model returned, and the derivatives with respect to them."""


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return nested tuples, lists and dictionaries with ``function`` applied to every tensor in them.

    The attributes of objects, such as dataclasses, count too; the objects are copied.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _has_attributes(leaf):
            return leaf
        twin = copy.copy(leaf)
        for key, value in leaf.items() if isinstance(leaf, MutableMapping) else ():
            twin[key] = map_tensors(function, value)
        for name, value in vars(leaf).items():
            if isinstance(value, (Tensor, tuple, list, dict)) or dataclasses.is_dataclass(value):
                object.__setattr__(twin, name, map_tensors(function, value))
        return twin

    return tree_map(of_leaf, tree)


def output_tensors(tree: Any) -> list[Tensor]:
    """Return all tensors within nested tuples, lists, dictionaries and attributes of objects."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(note, tree)
    return found


def differentiable(tree: Any) -> list[Tensor]:
    """Return those of the `output_tensors` that require gradients."""
    return [x for x in output_tensors(tree) if x.requires_grad]


class Seen:
    """The part of the model's output that the rows are derivatives of.

    Without a choice this is the whole output. The likelihoods of this package take one tensor, so for them it is the
    only tensor with a batch, or the one named ``logits``, where the model returns several things.

    Args:
        choice: of the user.
        likelihood: of the rows; None for those of the caller's loss.
    """

    def __init__(self, choice: Select, likelihood: Any) -> None:
        self._choice, self._takes_one = choice, isinstance(likelihood, Reparametrized)
        self._places: list[int] = []  # of the tensors that require gradients, in the last part

    def part_of(self, output: Any) -> Any:
        """Return the part of the model's output.

        Raises:
            ValueError: the output has no such part, or no tensor is in it.
        """
        part = self._part_of(output)
        if self._choice is not None and not output_tensors(part):
            raise ValueError(
                f"output={self._choice!r} gave {_described(part)} without a tensor, from what the model returned "
                f"({_described(output)}): choose the tensor that the loss takes"
            )
        self._places = [place for place, x in enumerate(output_tensors(part)) if x.requires_grad]
        return part

    def tensors_of(self, output: Any) -> list[Tensor]:
        """Return, of an output of the same structure, the tensors that required gradients in `part_of`."""
        found = output_tensors(self._part_of(output))
        return [found[place] for place in self._places]

    def _part_of(self, output: Any) -> Any:
        choice = self._choice
        if callable(choice):
            return choice(output)
        if choice is not None:
            try:
                return getattr(output, str(choice)) if _has(output, choice) else output[choice]
            except (KeyError, IndexError, TypeError) as error:
                described = _described(output)
                raise ValueError(f"output={choice!r} is no part of what the model returned: {described}") from error
        if isinstance(output, Tensor) or not self._takes_one:
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        batched = [x for x in output_tensors(output) if x.dim()]
        return batched[0] if len(batched) == 1 else output


def count_samples(selected: Sequence[Tensor], batch: Any) -> int:
    """Return N, the number of entries in the first dimension of what the likelihood sees.

    Raises:
        ValueError: there is no such dimension, or the tensors differ in it and none has as many entries as the input.
    """
    sizes = [len(x) for x in selected if x.dim()]
    if not sizes:
        raise ValueError(
            "the model returned a scalar: return one output for each sample, along the first dimension; if it returns "
            "its loss too, pass output= to say which part the likelihood sees"
        )
    given = next((len(x) for x in tensors_in(batch) if x.dim()), None)
    return given if given in sizes else sizes[0]


class _Together(torch.autograd.Function):
    """Copies tensors, so that one node of the graph gets the derivatives of all of them at once."""

    @staticmethod
    def forward(ctx: Any, callback: Callback, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.callback = callback
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*results)
        return tuple(result.clone() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.callback(ctx.saved_tensors, grads)
        return (None, *grads)


def call_on_backward(output: Any, results: Sequence[Tensor], callback: Callback) -> Any:
    """Have a backward pass that reaches ``results`` call back; return the output to use in place of ``output``.

    Hooks on several tensors would be called one after the other, when autograd has freed a part of the graph. And a
    hook that needs its tensor would keep it alive.

    Args:
        output: what the model returned.
        results: the tensors in it that require gradients.
        callback: called in every backward pass that reaches any of them.
    """
    copies = dict(zip(map(id, results), _Together.apply(callback, *results), strict=True))
    return map_tensors(lambda x: copies.get(id(x), x), output)


def constants_of(output: Any) -> Any:
    """Return an output with constants of the same numbers, which require gradients where its tensors do."""
    return map_tensors(lambda x: x.detach().requires_grad_(x.requires_grad), output)


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value)


def _has(output: Any, choice: Any) -> bool:
    return isinstance(choice, str) and not isinstance(output, Mapping) and hasattr(output, choice)


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return type(output).__name__
