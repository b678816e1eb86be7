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
_FEW = 8  # inputs or outputs


class NotByLayerError(RuntimeError):
    """The rows do not follow from the products with the weights; another way has to be taken."""


@dataclass
class _Products:
    """The products with one weight, in the order of the forward.

    Attributes:
        inputs: [P, N, I] of each, or [P, 1, I] where all points have the same, as the derivatives of the points have.
        outputs: as the residual function got them, of which gradients are taken.
        dims: the dimension of the points in each output.
        biases: the trained one of each product, or None.
    """

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
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach())
        if x.dim() > 2 and x.shape[-2] == 1:  # the same for all points
            dim = x.dim() - 2
            y = y.expand(*y.shape[:-2], self._samples, y.shape[-1])
        else:
            dim = self._dim_of(x)
        if not y.requires_grad:
            y.requires_grad_()
        found = self.products.setdefault(id(weight), _Products())
        found.inputs.append(_positions_first(x.detach(), dim))
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
    residual: Callable[[], Tensor], parameters: Sequence[Tensor], samples: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the residuals [N, …], without a graph, and their rows [N, …, *parameter.shape] of each parameter.

    Args:
        residual: returns the residuals of a batch of points.
        parameters: the trained ones.
        samples: N.

    Raises:
        NotByLayerError: a parameter is used in another way than in `F.linear`, or there are too many residuals.
    """
    recording = _Recording(parameters, samples)
    with torch.enable_grad(), recording:
        r = residual()
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
        gs = [_positions_first(next(rest), dim) for dim in found.dims]
        rows[key] = _outer_products(gs, found.inputs)
        for g_PNO, bias in zip(gs, found.biases, strict=True):
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


def _outer_products(gs: Sequence[Tensor], zs: Sequence[Tensor]) -> Tensor:
    """Return Σ_p g_np z_npᵀ [N, O, I] over the positions of all pairs of g [P, N, O] and z [P, N or 1, I].

    A batched product takes several times the time of products by entries where either side is narrow, which then lie in
    memory so that the other side is contiguous.
    """
    if zs[0].shape[2] <= _FEW:
        return _added([_by_inputs(g_PNO, z_PNI) for g_PNO, z_PNI in zip(gs, zs, strict=True)]).permute(1, 2, 0)
    if gs[0].shape[2] <= _FEW:
        return _added([_by_outputs(g_PNO, z_PNI) for g_PNO, z_PNI in zip(gs, zs, strict=True)])
    wide = [z.expand(len(z), g.shape[1], z.shape[2]) for g, z in zip(gs, zs, strict=True)]
    g_PNO, z_PNI = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (list(gs), wide))
    return torch.bmm(g_PNO.permute(1, 2, 0), z_PNI.transpose(0, 1))


def _by_inputs(g_PNO: Tensor, z_PNI: Tensor) -> Tensor:
    """Return Σ_p z_npi g_npo [I, N, O]."""
    if z_PNI.shape[1] == 1:  # one product of matrices for all points
        return (z_PNI[:, 0].mT @ g_PNO.flatten(1)).unflatten(1, g_PNO.shape[1:])
    rows_INO = z_PNI[0].mT[:, :, None] * g_PNO[0]
    for z_NI, g_NO in zip(z_PNI[1:], g_PNO[1:], strict=True):
        rows_INO.addcmul_(z_NI.mT[:, :, None], g_NO)
    return rows_INO


def _by_outputs(g_PNO: Tensor, z_PNI: Tensor) -> Tensor:
    """Return Σ_p g_npo z_npi [N, O, I]."""
    rows_NOI = g_PNO[0, :, :, None] * z_PNI[0, :, None, :]
    for z_NI, g_NO in zip(z_PNI[1:], g_PNO[1:], strict=True):
        rows_NOI.addcmul_(g_NO[:, :, None], z_NI[:, None, :])
    return rows_NOI


def _added(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum, in place of the first."""
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]
