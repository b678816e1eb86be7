"""Running means of the second moments over refreshes, of which D is made (docs/math.md, M17).

Dimensions: G groups, O outputs and I inputs of a group; B parameters in one batch, C calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.moments.second import Pair, form_of, second_moments
from tengrad_triton.curvature.sides import places_of_alike
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import matrix_shape
from tengrad_triton.sharding.shards import WHOLE, Whole

Scaling = Literal["none", "diagonal", "kronecker"]
"""What D is: the identity, of rank one on every weight, or a Kronecker product of two matrices in every group."""
KEEP = 0.8  # what a refresh leaves of the weight of earlier ones
SIDE_SHARE = 1 / 12  # a side is diagonal whose matrix costs more than this share of SGD's step


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


class _Seen(NamedTuple):
    """What a refresh sees of one parameter.

    Attributes:
        before: the moments of earlier refreshes.
        batches: what contributes to its rows; empty if it has none.
        parameter: a tensor of its shape.
        grad: V; None where the step does not update it.
    """

    before: Moments | None
    batches: MicroBatches
    parameter: Tensor
    grad: Tensor | None


class _New(NamedTuple):
    """The second moments of one refresh for one parameter: sums over ``samples`` of each call, and the square of V."""

    before: Moments | None
    calls: list[Pair]
    samples: int
    square: Tensor


def updated_moments(
    before: AllMoments,
    contributions: Contributions,
    layers: Sequence[LayerParams],
    grads: Grads,
    scaling: Scaling,
    side_share: float | None = None,
    shards: Whole = WHOLE,
) -> AllMoments:
    """Return the moments of every parameter after a refresh; none where D is the identity.

    Args:
        before: the moments of earlier refreshes.
        contributions: what the batches of the refresh contribute to the rows.
        layers: of the optimizer.
        grads: V of the parameters that the step updates; those without rows have moments too.
        scaling: what D is.
        side_share: what a matrix of D may cost in D⁻¹ V, as a share of SGD's step; None for a twelfth.
        shards: the processes among which parameters are cut, and with them V.
    """
    if scaling == "none":
        return {}
    most = 0.0 if scaling != "kronecker" else SIDE_SHARE if side_share is None else min(side_share, SIDE_SHARE)
    seen: dict[tuple[str, str], _Seen] = {}
    for layer in layers:
        batches, known = contributions.by_layer.get(layer.name, {}), before.get(layer.name, {})
        for name, parameter in layer.parameters.items():
            grad = grads.get((layer.name, name))
            if name in batches or grad is not None:
                seen[layer.name, name] = _Seen(known.get(name), batches.get(name, []), parameter, grad)
    made = iter(_updated([*seen.values()], most, shards))
    updated: dict[str, dict[str, Moments]] = {}
    for key in ((layer.name, name) for layer in layers for name in layer.parameters):
        own = next(made) if key in seen else _kept(before, *key)
        if own is not None:
            updated.setdefault(key[0], {})[key[1]] = own
    return updated


def _kept(before: AllMoments, layer: str, name: str) -> Moments | None:
    """Return the moments of a parameter that this refresh does not see, without the memory that they share."""
    own = before.get(layer, {}).get(name)
    return own and Moments(*(x.clone() for x in own))


def _updated(seen: Sequence[_Seen], side_share: float, shards: Whole) -> list[Moments]:
    """Return the moments with those of a refresh; they begin anew where sizes differ.

    Parameters whose moments have one size take each operation together.
    """
    new = _of_refresh(seen, side_share, shards)
    keys = [
        (len(one.calls), one.samples, *(x.shape for x in one.calls[0]), one.calls[0][0].dtype, one.calls[0][0].device)
        for one in new
    ]
    made: dict[int, Moments] = {}
    for places in places_of_alike(keys):
        made |= zip(places, _averaged([new[place] for place in places]), strict=True)
    return [made[place] for place in range(len(seen))]


def _of_refresh(seen: Sequence[_Seen], side_share: float, shards: Whole) -> list[_New]:
    """Return the second moments of one refresh."""
    with_rows = [one for one in seen if one.batches]
    forms = [form_of(one.batches, one.parameter, side_share, _are_matrices(one.before)) for one in with_rows]
    of_calls = iter(second_moments([(one.batches, form) for one, form in zip(with_rows, forms, strict=True)]))
    return [
        _New(
            one.before,
            next(of_calls) if one.batches else [_without_rows(one)],
            sum(calls[0].samples for calls in one.batches),
            square,
        )
        for one, square in zip(seen, _mean_squares(seen, shards), strict=True)
    ]


def _are_matrices(before: Moments | None) -> tuple[bool, bool]:
    return (False, False) if before is None else (before.rows.dim() == 3, before.columns.dim() == 3)


def _without_rows(one: _Seen) -> Pair:
    """Return what the second moments were so far, or ones: D is a number then."""
    if one.before is not None:
        rows, columns, _, weight = one.before
        return mean_of(rows, weight), mean_of(columns, weight)
    outputs, _, inputs = matrix_shape(one.parameter.shape)
    dtype = torch.float32 if one.grad is None else one.grad.dtype
    rows, columns = (torch.ones(1, n, dtype=dtype, device=one.parameter.device) for n in (outputs, inputs))
    return rows, columns


def _mean_squares(seen: Sequence[_Seen], shards: Whole) -> list[Tensor]:
    """Return those of V, of which each process may have a part."""
    if not shards.is_cut:
        return [_mean_square(one) for one in seen]
    sums = [
        torch.zeros((), device=one.parameter.device) if one.grad is None else widen(one.grad.detach()).square().sum()
        for one in seen
    ]
    totals = shards.total(torch.stack([x.double() for x in sums])).unbind()
    return [
        _mean_square(one) if one.grad is None else (total / one.parameter.numel()).to(own.dtype)
        for one, total, own in zip(seen, totals, sums, strict=True)
    ]


def _mean_square(one: _Seen) -> Tensor:
    """Return that of V; without V, what it was so far."""
    if one.grad is not None:
        return widen(one.grad.detach()).square().mean()
    return (
        torch.zeros((), device=one.parameter.device)
        if one.before is None
        else mean_of(one.before.square, one.before.weight)
    )


def mean_of(total: Tensor, weight: Tensor) -> Tensor:
    """Return a sum over its weight, which is 0 if nothing finite was seen so far."""
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def _averaged(alike: Sequence[_New]) -> list[Moments]:
    """Return the running means of parameters of one size, with as many calls."""
    calls, samples = len(alike[0].calls), alike[0].samples
    rows, columns = (
        torch.stack([pair[side] for one in alike for pair in one.calls]).unflatten(0, (-1, calls)) for side in (0, 1)
    )
    if samples:
        rows, columns = _with_equal_traces(rows, columns, samples)
    rows, columns = (x.squeeze(1) if calls == 1 else x.sum(1) for x in (rows, columns))
    square_B = torch.stack([one.square.to(rows.dtype) for one in alike])
    new = rows, columns, square_B, torch.ones_like(square_B)
    old = _stacked([one.before for one in alike], new)
    # A sum of squares bounds the other entries. Where one is not finite, D stays: no later step would recover.
    is_finite_B = (_traces(rows) + _traces(columns) + square_B).isfinite()
    means = torch._foreach_lerp(
        old,
        [torch.where(_along(is_finite_B, x), x, y) for x, y in zip(new, old, strict=True)],
        1 - KEEP,
    )
    return [Moments(*one) for one in zip(*(x.unbind() for x in means), strict=True)]


def _stacked(before: Sequence[Moments | None], new: Sequence[Tensor]) -> list[Tensor]:
    """Return the moments of earlier refreshes; zeros where they are of another size, or where there were none."""
    nothing = Moments(*(torch.zeros_like(x[0]) for x in new))
    fitting = [
        nothing
        if one is None or one.rows.shape != nothing.rows.shape or one.columns.shape != nothing.columns.shape
        else one
        for one in before
    ]
    # The model may have been converted.
    return [torch.stack([x.to(y.dtype) for x in own]) for own, y in zip(zip(*fitting, strict=True), new, strict=True)]


def _with_equal_traces(rows: Tensor, columns: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Return both over the samples, with equal traces and the same Kronecker product, for every call [B, C, …]."""
    trace_r, trace_c = (
        _traces(x.flatten(0, 1)).clamp(min=torch.finfo(x.dtype).tiny).view(x.shape[:2]) for x in (rows, columns)
    )
    factor_r, factor_c = ((x / y).sqrt() / samples for x, y in ((trace_c, trace_r), (trace_r, trace_c)))
    return rows * _along(factor_r, rows), columns * _along(factor_c, columns)


def _traces(x: Tensor) -> Tensor:
    """Return the sums over the groups of the traces of matrices [B, G, n, n], or of diagonals [B, G, n]."""
    return (x.diagonal(dim1=2, dim2=3) if x.dim() == 4 else x).sum((1, 2))


def _along(x: Tensor, like: Tensor) -> Tensor:
    """Return numbers [B, …] with as many dimensions as what they multiply."""
    return x.view(*x.shape, *[1] * (like.dim() - x.dim()))
