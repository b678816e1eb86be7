"""D of scaled damping from the rows and the gradients of refreshes: running means of second moments (math.md, M17).

Dimensions: G groups, O outputs and I inputs of a group, T taps of a convolution's kernel, C channels of a group and S
pixels of an image, N samples, P positions, K entries of a flat gradient; n entries of one side of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.scaling import Scale, Scales, Side, unit_of
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import Contribution, ConvInput, EmbeddingGrads, OuterProducts, flatten_rows, matrix_view

Scaling = Literal["none", "diagonal", "kronecker"]
"""What D is: the identity, of rank one on every weight, or a Kronecker product of two matrices in every group."""
KEEP = 0.8  # what a refresh leaves of the weight of earlier ones
FLOOR = 0.01  # what every eigenvalue gets in addition before the root, as a share of their mean
LEAST = 1e-4  # the least size of V that D takes from a parameter, as a share of that of all parameters
LARGEST = 128  # a side with more entries is diagonal: its matrix would cost more than it gains
SIDE_SHARE = 1 / 12  # likewise a side whose matrix costs more than this share of SGD's step


class Moments(NamedTuple):
    """Running means over refreshes for one parameter, all with the same weights.

    Attributes:
        rows: second moments of the output gradients of each group, [G, O, O] or their diagonals [G, O].
        columns: second moments of the inputs of each group, [G, I, I] or their diagonals [G, I].
        square: the mean square of the entries of V.
        weight: the sum of the weights, which is below 1.
    """

    rows: Tensor
    columns: Tensor
    square: Tensor
    weight: Tensor


Grads = Mapping[tuple[str, str], Tensor]
"""Gradients V by the names of layer and parameter."""
AllMoments = Mapping[str, Mapping[str, Moments]]
"""The moments of every parameter seen so far, by its layer's name and its own name within that."""


def updated_moments(
    before: AllMoments,
    contributions: Contributions,
    layers: Sequence[LayerParams],
    grads: Grads,
    scaling: Scaling,
    side_share: float | None = None,
) -> AllMoments:
    """Return the moments of every parameter after a refresh; none where D is the identity.

    Args:
        before: the moments of earlier refreshes.
        contributions: what the batches of the refresh contribute to the rows.
        layers: of the optimizer.
        grads: V of the parameters that the step updates; those without rows have moments too.
        scaling: what D is.
        side_share: what a matrix of D may cost in D⁻¹ V, as a share of SGD's step; None for a twelfth.
    """
    if scaling == "none":
        return {}
    updated: dict[str, dict[str, Moments]] = {}
    for layer in layers:
        batches, known = contributions.by_layer.get(layer.name, {}), before.get(layer.name, {})
        for name, parameter in layer.parameters.items():
            own, grad = known.get(name), grads.get((layer.name, name))
            if name in batches or grad is not None:
                own = _updated(own, batches.get(name, []), parameter, grad, scaling, side_share)
            if own is not None:  # one that this refresh does not see keeps what it has
                updated.setdefault(layer.name, {})[name] = own
    return updated


def _updated(
    before: Moments | None,
    batches: MicroBatches,
    parameter: Tensor,
    grad: Tensor | None,
    scaling: Scaling,
    side_share: float | None = None,
) -> Moments:
    """Return the moments of one parameter with those of a refresh; they begin anew where sizes differ.

    Args:
        before: the moments of earlier refreshes.
        batches: what contributes to its rows.
        parameter: a tensor of its shape.
        grad: V; None where the step does not update it.
        scaling: what D is; with ``"kronecker"``, second moments are matrices where a side has few entries.
        side_share: what a matrix may cost, as a share of SGD's step.
    """
    most = 0.0 if scaling != "kronecker" else SIDE_SHARE if side_share is None else min(side_share, SIDE_SHARE)
    new = _of_refresh(before, batches, parameter, grad, most)
    if before is None or before.rows.shape != new.rows.shape or before.columns.shape != new.columns.shape:
        before = Moments(*map(torch.zeros_like, new))
    is_finite = torch.stack([x.isfinite().all() for x in new]).all()  # otherwise D stays: no later step would recover
    old = [x.to(y.dtype) for x, y in zip(before, new, strict=True)]  # the model may have been converted
    seen = [torch.where(is_finite, y, x) for x, y in zip(old, new, strict=True)]
    return Moments(*torch._foreach_lerp(old, seen, 1 - KEEP))


def _of_refresh(
    before: Moments | None, batches: MicroBatches, parameter: Tensor, grad: Tensor | None, side_share: float
) -> Moments:
    """Return the moments of one refresh, with weight 1; all sides are diagonal with a ``side_share`` of 0."""
    outputs, _, inputs = matrix_view(parameter.detach()).shape
    if not batches:
        return _without_rows(before, parameter, grad)
    is_matrix = _which_are_matrices(before, batches, outputs, inputs, side_share)
    groups = next((call.g_NGPO.shape[1] for call in _outer_products(batches)), 1)
    parts = [[_second_moments(call, is_matrix, (groups, outputs, inputs)) for call in calls] for calls in batches]
    # Micro-batches are one batch: each call's moments are those of all of them, before different calls are added.
    of_calls = [_with_equal_traces(*_sums(list(filter(None, own)))) for own in zip_longest(*parts)]
    total = sum(calls[0].samples for calls in batches)
    rows, columns = (x / total for x in _sums(of_calls))
    square = _mean_square(grad, rows, before)
    return Moments(rows, columns, square, torch.ones_like(square))


def _without_rows(before: Moments | None, parameter: Tensor, grad: Tensor | None) -> Moments:
    """Return moments of V alone; those of the sides stay what they were, or D is a number."""
    if before is not None:
        rows, columns = (_mean(x, before.weight) for x in (before.rows, before.columns))
    else:
        outputs, _, inputs = matrix_view(parameter.detach()).shape
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        rows, columns = (torch.ones(1, n, dtype=dtype, device=parameter.device) for n in (outputs, inputs))
    square = _mean_square(grad, rows, before)
    return Moments(rows, columns, square, torch.ones_like(square))


def _mean_square(grad: Tensor | None, like: Tensor, before: Moments | None) -> Tensor:
    """Return that of V; without V, what it was so far."""
    if grad is not None:
        return grad.detach().to(like.dtype).square().mean()
    return like.new_zeros(()) if before is None else _mean(before.square, before.weight)


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    """Return a sum over its weight, which is 0 if nothing finite was seen so far."""
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def _trace(x: Tensor) -> Tensor:
    """Return the sum over the groups of the traces of matrices, or of diagonals."""
    return (x.diagonal(dim1=1, dim2=2) if x.dim() == 3 else x).sum()


def _which_are_matrices(
    before: Moments | None, batches: MicroBatches, outputs: int, inputs: int, side_share: float
) -> tuple[bool, bool]:
    """Return whether the second moments of outputs and of inputs are matrices, by their numbers; once so, for good.

    With a matrix of n entries D⁻¹ V takes 2 n flops for each entry of V; SGD's step takes 6 N P.
    """
    outers = _outer_products(batches)
    embeddings = [call for calls in batches for call in calls if isinstance(call, EmbeddingGrads)]
    if not outers and not embeddings:
        return False, False
    positions = sum(call.samples * call.g_NGPO.shape[2] for call in outers) + sum(c.ids_NP.numel() for c in embeddings)
    most = min(LARGEST, math.floor(3 * positions * side_share))
    groups = outers[0].g_NGPO.shape[1] if outers else 1
    were = (False, False) if before is None else (before.rows.dim() == 3, before.columns.dim() == 3)
    return were[0] or (not embeddings and 1 < outputs // groups <= most), were[1] or 1 < inputs <= most


def _outer_products(batches: MicroBatches) -> list[OuterProducts]:
    return [call for calls in batches for call in calls if isinstance(call, OuterProducts)]


def _second_moments(
    call: Contribution, is_matrix: tuple[bool, bool], sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the sums over samples of the second moments of both sides, for (groups, outputs, inputs of a group).

    The Kronecker product of their means over samples is the second moment of the rows if inputs are independent of
    output gradients, and both of those at other positions (M15).
    """
    if isinstance(call, OuterProducts):
        sides, positions = _of_outer_products(call, is_matrix, sizes[2]), call.g_NGPO.shape[2]
    elif isinstance(call, EmbeddingGrads):
        sides, positions = _of_embedding(call, is_matrix[1]), call.ids_NP.shape[1]
    else:
        sides, positions = _of_rows(flatten_rows(call.j_NK), sizes), 1
    rows, columns = (
        (x.diag_embed() if full and x.dim() == 2 else x) / math.sqrt(positions)
        for x, full in zip(sides, is_matrix, strict=True)
    )
    return rows, columns


def _sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows, columns = zip(*pairs, strict=True)
    return torch.stack(rows).sum(0), torch.stack(columns).sum(0)


def _with_equal_traces(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return multiples of both with the same Kronecker product."""
    trace_r, trace_c = (_trace(x).clamp(min=torch.finfo(x.dtype).tiny) for x in (rows, columns))
    return rows * (trace_c / trace_r).sqrt(), columns * (trace_r / trace_c).sqrt()


def _of_outer_products(outer: OuterProducts, is_matrix: tuple[bool, bool], inputs: int) -> tuple[Tensor, Tensor]:
    """Return Σ_np g gᵀ and Σ_np a aᵀ of each group; a convolution's sum over its taps too, or over the pixels."""
    outer = outer.widened()
    rows = _moment(outer.g_NGPO, is_matrix[0])
    if not isinstance(outer.a, ConvInput):
        return rows, _moment(outer.a.unflatten(3, (-1, inputs)).flatten(2, 3), is_matrix[1])
    x_NGCS = outer.a.x_NCHW.flatten(2).unflatten(1, (-1, inputs))
    taps, positions = outer.a.inputs // inputs, outer.g_NGPO.shape[2]
    moment = (x_NGCS @ x_NGCS.mT).sum(0) if is_matrix[1] else x_NGCS.square().sum((0, 3))
    return rows, moment * (taps * positions / x_NGCS.shape[3])


def _of_embedding(embedding: EmbeddingGrads, is_matrix: bool) -> tuple[Tensor, Tensor]:
    """Return how often each vector was read, and Σ_np g gᵀ."""
    g_NPD = widen(embedding.g_NPD)  # half precision counts to 256 or 2048 only
    ones = g_NPD.new_ones(embedding.ids_NP.numel())
    counts = g_NPD.new_zeros(embedding.num_embeddings).index_add_(0, embedding.ids_NP.flatten(), ones)
    return counts.unsqueeze(0), _moment(g_NPD.unsqueeze(1), is_matrix)


def _of_rows(j_NK: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return Σ_n of the squares of J_n, summed over its inputs, and over its outputs as a share of all, times N."""
    groups, outputs, inputs = sizes
    squares_GOTI = widen(j_NK).square().sum(0).view(groups, outputs // groups, -1, inputs)
    columns_GI = squares_GOTI.sum((1, 2))
    share = len(j_NK) / columns_GI.sum().clamp(min=torch.finfo(columns_GI.dtype).tiny)
    return squares_GOTI.sum((2, 3)), columns_GI * share


def _moment(x_NGPI: Tensor, is_matrix: bool) -> Tensor:
    """Return Σ_np x xᵀ of each group [G, I, I], or its diagonal [G, I]."""
    if not is_matrix:
        return x_NGPI.square().sum((0, 2))
    x_GRI = x_NGPI.transpose(0, 1).flatten(1, 2)
    return x_GRI.mT @ x_GRI


def scales_of(moments: AllMoments, layers: Sequence[LayerParams]) -> Scales:
    """Return D of every parameter: the root of the Kronecker product of its second moments.

    Each side has eigenvalues (λ + `FLOOR` mean λ)^½, divided by their root mean square. The root mean square of the
    eigenvalues of D is that of the entries of V, times the parameter's `unit_of`; at least `LEAST` times that of all
    parameters, because V may be zero, or rounding alone, as for a bias before a batch norm.
    """
    squares = [_mean(one.square, one.weight) for layer in moments.values() for one in layer.values()]
    if not squares:
        return {}
    square_T = torch.stack(squares)
    least = LEAST**2 * square_T.mean()
    sizes = iter(torch.where(least > 0, square_T.maximum(least), torch.ones_like(square_T)).sqrt().unbind())
    parameters = {layer.name: layer.parameters for layer in layers}

    def scale(one: Moments, parameter: Tensor) -> Scale:
        rows = _root(one.rows)
        return Scale(rows._replace(values_Gn=rows.values_Gn * (next(sizes) * unit_of(parameter))), _root(one.columns))

    return {
        name: {param_name: scale(one, parameters[name][param_name]) for param_name, one in layer.items()}
        for name, layer in moments.items()
    }


def _root(moment: Tensor) -> Side:
    """Return the root of second moments with the floor, of root mean square 1; ones where they are zero.

    In float32 the eigenvalue solver may not converge, where many eigenvalues are alike.
    """
    values_Gn, basis_Gnn = moment, None
    if moment.dim() == 3:
        values_Gn, basis_Gnn = (x.to(moment.dtype) for x in torch.linalg.eigh(moment.double()))
    values_Gn = values_Gn.clamp(min=0.0)
    mean = values_Gn.mean()
    roots_Gn = (values_Gn + FLOOR * mean).sqrt()
    roots_Gn = torch.where(mean > 0, roots_Gn, torch.ones_like(roots_Gn))
    return Side(roots_Gn / roots_Gn.square().mean().sqrt(), basis_Gnn)
