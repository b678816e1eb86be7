"""Rows of residuals from the inputs and the output gradients of linear layers, by one backward pass for all points.

A residual that uses each weight only in products W z has the rows Σ_p g_np z_npᵀ: z are the inputs of the products with
W, among them the derivatives that `tengrad_triton.jets` carries through a layer, and g the gradients of the residuals
with respect to the products. These are the per-sample factors of which Dangel, Müller and Zeinhofer (2024) take means.

A `TorchFunctionMode` sees the products. Any other use of a parameter is refused, and so is a product whose inputs have
no dimension of the points. The caller compares the rows with autograd's, because a weight may also be used where no
mode sees it, as in the derivatives that `torch.autograd.grad` takes.

Dimensions: N points, M residuals at each, P positions of a product, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

_MOST_RESIDUALS = 8  # at a point: each takes a backward pass
_FEW_INPUTS = 8


class NotByLayerError(RuntimeError):
    """The rows do not follow from the products with the weights; another way has to be taken."""


@dataclass
class _Products:
    """The products with one weight, in the order of the forward: inputs [P, N, I] and outputs [P, N, O]."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)


class _Recording(TorchFunctionMode):
    """Records the products with weights, and makes their outputs what gradients are taken of."""

    def __init__(self, parameters: Sequence[Tensor], samples: int) -> None:
        super().__init__()
        self._ids, self._samples = {id(p) for p in parameters}, samples
        self.products: dict[int, _Products] = {}

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **given)
        uses = self._uses_parameter(args) or (given and self._uses_parameter(tuple(given.values())))
        if uses and getattr(func, "__name__", "") != "__get__":  # that asks for its shape, type or device
            raise NotByLayerError(f"{getattr(func, '__name__', func)} uses a parameter")
        return func(*args, **given)

    def _uses_parameter(self, values: Sequence[Any]) -> bool:
        return any(
            self._uses_parameter(value) if type(value) in (tuple, list) else id(value) in self._ids for value in values
        )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in self._ids:
            if bias is not None and id(bias) in self._ids:
                raise NotByLayerError("a bias belongs to a weight that is not trained")
            return F.linear(x, weight, bias)
        if x.dim() > 2 and x.shape[-2] == 1:  # the same for all points, as the derivatives of the points
            x = x.expand(*x.shape[:-2], self._samples, x.shape[-1])
        dim = self._dim_of(x)
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach())
        if not y.requires_grad:
            y.requires_grad_()
        found = self.products.setdefault(id(weight), _Products())
        found.inputs.append(x.detach())
        found.outputs.append(y)
        found.dims.append(dim)
        found.biases.append(bias if bias is not None and id(bias) in self._ids else None)
        return y

    def _dim_of(self, x: Tensor) -> int:
        """Return the dimension of the points: the one before the features, or the first."""
        if x.dim() > 1 and x.shape[-2] == self._samples:
            return x.dim() - 2
        if x.dim() > 1 and len(x) == self._samples:
            return 0
        raise NotByLayerError("the input of a layer has no dimension of the points")


def rows_by_layer(
    residual: Callable[..., Tensor], parameters: Sequence[Tensor], points: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Return the residuals [N, …], without a graph, and their rows [N, …, *parameter.shape] of each parameter.

    Args:
        residual: a function of the points.
        parameters: the trained ones.
        points: tensors whose first dimension is N.

    Raises:
        NotByLayerError: a parameter is used in another way than in `F.linear`, or there are too many residuals.
    """
    recording = _Recording(parameters, len(points[0]))
    with torch.enable_grad(), recording:
        r = residual(*points)
    if not recording.products or r.numel() > _MOST_RESIDUALS * len(r):
        raise NotByLayerError("no parameter is used in F.linear, or there are many residuals at a point")
    outputs = [y for found in recording.products.values() for y in found.outputs]
    with torch.enable_grad():
        sums_M = r.reshape(len(r), -1).sum(0).unbind()
    options: dict[str, Any] = {"retain_graph": len(sums_M) > 1, "allow_unused": True, "materialize_grads": True}
    by_residual = [_rows_of(recording, torch.autograd.grad(total, outputs, **options), parameters) for total in sums_M]
    rows = [torch.stack(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*by_residual, strict=True)]
    return r.detach(), [j.view(*r.shape, *p.shape) for j, p in zip(rows, parameters, strict=True)]


def _rows_of(recording: _Recording, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows [N, *parameter.shape] of every parameter from the gradients of all products' outputs."""
    rows: dict[int, Tensor] = {}
    rest = iter(grads)
    for key, found in recording.products.items():
        parts = [_positions_first(next(rest), dim) for dim in found.dims]
        inputs = [_positions_first(z, dim) for z, dim in zip(found.inputs, found.dims, strict=True)]
        rows[key] = _outer_products(torch.cat(parts), torch.cat(inputs))
        for g_PNO, bias in zip(parts, found.biases, strict=True):
            if bias is not None:
                of_bias = g_PNO[0] if len(g_PNO) == 1 else g_PNO.sum(0)
                rows[id(bias)] = rows[id(bias)] + of_bias if id(bias) in rows else of_bias
    n = len(next(iter(rows.values())))
    return [rows[id(p)] if id(p) in rows else p.new_zeros(n, *p.shape) for p in parameters]


def _positions_first(x: Tensor, dim: int) -> Tensor:
    """Return [P, N, features] of a tensor whose dimension ``dim`` is that of the points."""
    if dim != x.dim() - 2:
        x = x.movedim(dim, -2)
    return x[None] if x.dim() == 2 else x.flatten(0, -3)


def _outer_products(g_PNO: Tensor, z_PNI: Tensor) -> Tensor:
    """Return Σ_p g_np z_npᵀ [N, O, I]. For few inputs a batched product takes twice the time of products by entries."""
    if z_PNI.shape[2] > _FEW_INPUTS:
        return torch.bmm(g_PNO.permute(1, 2, 0), z_PNI.transpose(0, 1))
    rows_NIO = z_PNI[0, :, :, None] * g_PNO[0, :, None, :]
    for z_NI, g_NO in zip(z_PNI[1:], g_PNO[1:], strict=True):
        rows_NIO.addcmul_(z_NI[:, :, None], g_NO[:, None, :])
    return rows_NIO.mT
