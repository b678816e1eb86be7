"""The ways to the rows of J̃: functions that return the residuals of a batch and the gradient of each.

`rows` says when each is exact, and chooses.

Dimensions: N points of a term, M residuals at each point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from typing_extensions import override

from tengrad_triton.capture.rows.rerun import batched_grads, ignore_vmap_warning
from tengrad_triton.layers.stateless import call_with, places_of
from tengrad_triton.residuals.by_layer import rows_by_layer
from tengrad_triton.residuals.expanded import residuals_and_rows
from tengrad_triton.residuals.terms import Bound, Residual

_CHUNK_BYTES = 256 * 2**20  # one pass computes rows of at most this size
_RESIDUALS_PER_PASS = 16  # backward passes of this many residuals are batched into one

Way = Callable[[Sequence[Tensor], tuple[Tensor, ...]], tuple[Tensor, list[Tensor]]]
"""From the trained parameters and a term's points to its residuals [N, …] and the rows [N, …, *parameter.shape]."""


class _Captured(TorchFunctionMode):
    """Gives operations other tensors in the place of parameters, by the parameters' ids."""

    def __init__(self, tensor_of: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensor_of = tensor_of

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: self._tensor_of.get(id(x), x), (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def captured(model: nn.Module, residual: Residual) -> Way:
    """Return the way of `batched` that reaches the parameters that the residual function holds itself."""

    def context(parameters: Sequence[Tensor], tensors: Iterable[Tensor]) -> _Captured:
        return _Captured(dict(zip(map(id, parameters), tensors, strict=True)))

    return batched(model, residual, context)


def batched(
    model: nn.Module,
    residual: Residual,
    context: Callable[[Sequence[Tensor], Iterable[Tensor]], AbstractContextManager[Any]] = lambda *_: nullcontext(),
) -> Way:
    """Return the way that transforms the residual function of single points by `torch.func`."""
    bound = Bound(model, residual)

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        places = places_of(bound)
        names = bound.names_of(parameters)
        row_bytes = sum(p.numel() * p.element_size() for p in parameters)

        def of_point(*point: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            def forward(replaced: dict[str, Tensor]) -> Tensor:
                with context(parameters, replaced.values()):
                    return call_with(bound, places, replaced, tuple(x[None] for x in point))[0]

            transformed: Any = vjp(forward, dict(zip(names, (p.detach() for p in parameters), strict=True)))
            r, pull = transformed
            if r.numel() == 1:
                return r, pull(torch.ones_like(r))[0]
            eye = torch.eye(r.numel(), dtype=r.dtype, device=r.device).view(-1, *r.shape)
            return r, {name: g.view(*r.shape, *g.shape[1:]) for name, g in vmap(pull)(eye)[0].items()}

        chunk = max(1, _CHUNK_BYTES // row_bytes)
        with ignore_vmap_warning(), torch.no_grad():
            found = vmap(of_point, chunk_size=chunk if len(points[0]) > chunk else None)(*(x.detach() for x in points))
        return found[0], [found[1][name] for name in names]

    return rows


def by_layer(model: nn.Module, residual: Residual) -> Way:
    """Return the way by the inputs and output gradients of linear layers."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        return rows_by_layer(lambda: residual(*points), parameters, len(points[0]))

    return rows


def expanded(model: nn.Module, residual: Residual) -> Way:
    """Return the way of one backward pass with a copy of the weights for each point."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            return residuals_and_rows(model, residual, points, check=False)

    return rows


def backward(model: nn.Module, residual: Residual) -> Way:
    """Return the way of one backward pass for each residual, which is exact for any function."""

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            r = residual(*points)
            flat = r.reshape(-1)
        parts: list[list[Tensor]] = [[] for _ in parameters]
        for first in range(0, len(flat), _RESIDUALS_PER_PASS):
            last = min(len(flat), first + _RESIDUALS_PER_PASS)
            cotangents = torch.zeros(last - first, len(flat), dtype=r.dtype, device=r.device)
            cotangents[torch.arange(last - first), torch.arange(first, last)] = 1
            for grads in batched_grads([flat], list(parameters), [cotangents]):
                for part, p, grad in zip(parts, parameters, grads, strict=True):
                    part.append(torch.zeros_like(p) if grad is None else grad)
        return r.detach(), [torch.stack(part).view(*r.shape, *part[0].shape) for part in parts]

    return rows


WAYS: dict[str, Callable[[nn.Module, Residual], Way]] = {
    "by layer": by_layer,
    "batched": batched,
    "captured": captured,
    "expanded": expanded,
    "backward": backward,
}
