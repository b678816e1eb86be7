"""Rows of residuals from one backward pass, also where the residual calls `torch.autograd.grad` itself.

Each sample n gets its own copy θ_n of the weights θ. Then the gradient of Σ_n r_n with respect to the copies is every
row at once: the derivative with respect to θ_n is ∂r_n/∂θ, because no other residual uses copy n.

The residual runs as it is, with its own parameters. A `TorchFunctionMode` sees every operation that is given a
parameter, or a tensor that was computed from parameters alone, and runs it under `torch.func.vmap`: on a batch of one
sample, with that sample's copy. What comes out is an ordinary tensor of the batch, so that
`torch.autograd.grad(…, create_graph=True)` works on it, to any order. Operations without parameters run unchanged.

A residual that mixes samples, or that hands parameters to code that no mode sees (`torch.autograd.Function`, a
scripted module), has other rows than these. So their sum with random weights is compared with the gradient of the
residual as the caller wrote it.

Dimensions: N samples, M residuals for each; "rows_NM…" is [N, M, *parameter.shape].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from typing_extensions import override

from tengrad_triton.capture.rows.rerun import ignore_vmap_warning
from tengrad_triton.capture.rows.weights import random_weights
from tengrad_triton.residuals.proofs import agree

Points = Tensor | Sequence[Tensor]
"""The inputs [N, …] of a residual function; a sequence is several arguments."""

# torch raises these for operations that it cannot run on single samples.
_CANNOT_RUN = (RuntimeError, ValueError, TypeError, IndexError)


class NotExpandableError(RuntimeError):
    """A copy of the weights for each sample does not give the rows of this residual; another way has to be taken."""


def expanded_rows(
    model: nn.Module, residual: Callable[..., Tensor], points: Points, *, check: bool = True
) -> list[Tensor]:
    """Return the rows ∂r_n/∂θ of every trained parameter by one backward pass for each of the M residuals of a sample.

    Args:
        model: the module whose parameters are trained.
        residual: a function of the points that returns [N] or [N, …]; a closure over ``model``.
        points: its arguments, tensors whose first dimension is N.
        check: whether to compare the rows with the gradient of the residual as it is, which costs one more forward and
            backward. Once is enough for a residual function that does the same operations at every call.

    Returns:
        A tensor [N, …, *parameter.shape] for each parameter of ``model`` that requires a gradient, in the order of
        ``model.parameters()``, where [N, …] is the shape of the residuals. A parameter that no residual uses has zeros.

    Raises:
        NotExpandableError: an operation cannot be run on one sample, or the rows are not those of the residual.
    """
    return residuals_and_rows(model, residual, points, check=check)[1]


def residuals_and_rows(
    model: nn.Module, residual: Callable[..., Tensor], points: Points, *, check: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Return the residuals [N, …], without a graph, and what `expanded_rows` returns; arguments and errors as there."""
    args = (points,) if isinstance(points, Tensor) else tuple(points)
    parameters = [p for p in model.parameters() if p.requires_grad]
    constants = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    mode = _Expansion(parameters, constants, args)
    devices = [args[0].device] if args[0].is_cuda else []
    with torch.random.fork_rng(devices, enabled=check), torch.enable_grad(), mode:
        try:
            r = residual(*args)
        except NotExpandableError:
            raise
        except _CANNOT_RUN as error:  # or an error of the caller's, which the fallback shows
            raise NotExpandableError(f"the residual does not run on single samples: {error}") from error
    with torch.enable_grad():
        r = mode.batched_result(r)
        rows = _rows(r, mode.copies)
        if check:
            _compare(residual(*args), r.detach(), rows, parameters)
    return r.detach(), rows


def _rows(r: Tensor, copies: Sequence[Tensor]) -> list[Tensor]:
    """Return rows_NM… of the copies [N, …] of each parameter."""
    sums_M = r.reshape(len(r), -1).sum(0)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    columns = [torch.autograd.grad(total, copies, **options) for total in sums_M]
    rows = columns[0] if len(columns) == 1 else [torch.stack(parts, 1) for parts in zip(*columns, strict=True)]
    return [rows_NM.view(*r.shape, *copy.shape[1:]) for rows_NM, copy in zip(rows, copies, strict=True)]


def _compare(expected: Tensor, r: Tensor, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise NotExpandableError unless values and rows are those of the residual as it is."""
    c = random_weights(r.numel(), r).view_as(r)
    is_proved = expected.shape == r.shape
    if is_proved:
        grads = torch.autograd.grad(expected, parameters, c, allow_unused=True, materialize_grads=True)
        is_proved = agree(r, rows, (expected.detach(), list(grads)), parameters)
    if not is_proved:
        raise NotExpandableError("the residual mixes samples, or hands parameters to code that no mode sees")


@dataclass
class _Call:
    """A call of an operation that is given parameters, or tensors that were computed from these alone.

    Args:
        func: the operation.
        leaves: its arguments.
        spec: how `tree_unflatten` makes positional arguments and keywords of them.
        has_twin: which leaves were computed from parameters alone.
        batch_dims: for each leaf, the dimension of size k N that has k entries for each sample; None where none has.
    """

    func: Callable[..., Any]
    leaves: Sequence[Any]
    spec: TreeSpec
    has_twin: Sequence[bool]
    batch_dims: Sequence[int | None]

    def on_samples(self, samples: int, copies: Sequence[Tensor]) -> Any:
        """Return what the operation returns for the batch, each sample with its own copy of the parameters."""
        pairs = [
            (leaf.as_subclass(Tensor), d) for leaf, d in zip(self.leaves, self.batch_dims, strict=True) if d is not None
        ]
        dim = pairs[0][1]
        if any(d != dim for _, d in pairs):
            raise NotExpandableError(f"{self._name} finds the samples in different dimensions of its arguments")
        by_sample = [x.unflatten(dim, (-1, samples)).movedim(dim + 1, 0) for x, _ in pairs]
        entries = {x.shape[dim + 1] for x in by_sample}
        outputs = self._mapped([*by_sample, *copies])
        for y in tree_leaves(outputs):
            if not isinstance(y, Tensor) or y.dim() < dim + 2 or y.shape[dim + 1] not in entries:
                raise NotExpandableError(f"{self._name} returns no batch for the entries of one sample")
        return tree_map(lambda y: y.movedim(0, dim + 1).flatten(dim, dim + 1), outputs)

    def on_copies(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """Return, for each tensor that the operation returns, its value [N, …] for the copies of each sample."""
        return [leaf for leaf in tree_leaves(self._mapped(copies)) if isinstance(leaf, Tensor)]

    def _mapped(self, tensors: Sequence[Tensor]) -> Any:
        """Run the operation once for each sample, on the leaves that are batched and then on those with twins."""
        places = [index for index, dim in enumerate(self.batch_dims) if dim is not None]
        places += [index for index, twin in enumerate(self.has_twin) if twin]

        def one_sample(*given: Tensor) -> Any:
            leaves = list(self.leaves)
            for place, tensor in zip(places, given, strict=True):
                leaves[place] = tensor
            args, kwargs = tree_unflatten(leaves, self.spec)
            return self.func(*args, **kwargs)

        try:
            with ignore_vmap_warning():
                return vmap(one_sample, randomness="error")(*tensors)
        except _CANNOT_RUN as error:
            raise NotExpandableError(f"{self._name} does not run on single samples: {error}") from error

    @property
    def _name(self) -> str:
        return getattr(self.func, "__name__", repr(self.func))


class _Expansion(TorchFunctionMode):
    """Runs every operation on parameters with a copy of them for each sample.

    A tensor that was computed from parameters alone has a twin [N, *shape]: its value for the copy of each sample.

    Args:
        parameters: have twins from the start, `copies`.
        constants: tensors that belong to no sample, whatever their shape.
        points: the arguments [N, …] of the residual. Every other tensor whose first dimension is N belongs to the
            samples as well. One that was computed from the points may have the samples in its second dimension, as
            the jets of `tengrad_triton.jets` do, or have k N entries, as `torch.cat` of k batches does: entry
            n + N j belongs to sample n.
    """

    def __init__(self, parameters: Sequence[Tensor], constants: Sequence[Tensor], points: Sequence[Tensor]) -> None:
        super().__init__()
        self.copies = [p.detach().expand(len(points[0]), *p.shape).requires_grad_() for p in parameters]
        # Both are kept: an id belongs to another tensor once its own is gone.
        self._twins = {id(p): (p, copy) for p, copy in zip(parameters, self.copies, strict=True)}
        self._constants = {id(tensor): tensor for tensor in constants}
        self._computed = {id(tensor): (tensor, 0) for tensor in points}
        self._samples = len(points[0])

    def batched_result(self, r: Any) -> Tensor:
        """Return what a residual function returned; raise NotExpandableError unless it is [N, …]."""
        if self._batch_dim(r) != 0 or len(r) != self._samples:
            raise NotExpandableError(f"the residuals of {self._samples} points are [N, …], one or more a point")
        if r.is_complex():
            raise NotExpandableError("the residuals are complex; return their real and imaginary parts side by side")
        if not r.requires_grad:
            raise NotExpandableError("the residuals do not depend on trained parameters")
        return r.as_subclass(Tensor)

    def _batch_dim(self, x: Any) -> int | None:
        """Return the dimension of a tensor that has the entries of the samples; None where none has."""
        if not isinstance(x, Tensor) or x.dim() == 0 or id(x) in self._constants or id(x) in self._twins:
            return None
        if id(x) in self._computed:
            return self._computed[id(x)][1]
        return 0 if len(x) == self._samples else None

    def _note(self, result: Any, before: Sequence[int]) -> Any:
        """Note of tensors that were computed from the points where the samples are: as ``before``, if that can be."""
        for x in tree_leaves(result):
            if not isinstance(x, Tensor) or x.dim() == 0 or x.numel() == 0:
                continue
            sizes = dict(enumerate(x.shape[:2]))
            same = [dim for dim in before if dim in sizes and sizes[dim] % self._samples == 0]
            found = same or [dim for dim, size in sizes.items() if size == self._samples]
            if found:
                self._computed[id(x)] = (x, found[0])
        return result

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves, spec = tree_flatten((tuple(args), dict(kwargs or {})))
        has_twin = [id(leaf) in self._twins for leaf in leaves]
        if not any(has_twin):
            result = func(*args, **(kwargs or {}))
            before = [self._computed[id(leaf)][1] for leaf in leaves if id(leaf) in self._computed]
            return self._note(result, before) if before else result
        if func is torch.autograd.grad:
            raise NotExpandableError("the residual differentiates with respect to parameters")
        call = _Call(func, leaves, spec, has_twin, [self._batch_dim(leaf) for leaf in leaves])
        twins = [self._twins[id(leaf)][1] for leaf, twin in zip(leaves, has_twin, strict=True) if twin]
        if before := [dim for dim in call.batch_dims if dim is not None]:
            return self._note(call.on_samples(self._samples, twins), before)
        return self._on_parameters(call, twins)

    def _on_parameters(self, call: _Call, twins: Sequence[Tensor]) -> Any:
        """Return what the operation returns, with twins for the tensors among it."""
        args, kwargs = tree_unflatten(call.leaves, call.spec)
        result = call.func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if tensors:
            for tensor, twin in zip(tensors, call.on_copies(twins), strict=True):
                self._twins[id(tensor)] = (tensor, twin)
        return result
