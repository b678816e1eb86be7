"""The part of J and D that belongs to this process's outputs, where parameters are cut among processes.

Every process has what all samples contribute, and D. It keeps the columns of J D⁻¹ that belong to its own outputs: the
products with J are sums over the processes then, and an update is local. Where D has a matrix for the outputs, that
mixes the outputs of several processes: J D⁻¹ and J D^-½ are made of whole output gradients before they are cut, and
D⁻¹ V of whole gradients V.

Dimensions: N samples, G groups, P positions, O outputs, K entries of a row, D entries of an embedded vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.scaling import Multiplier, Scale, Scales, explicit_rows
from tengrad_triton.curvature.sides import Side
from tengrad_triton.curvature.target import Target
from tengrad_triton.layers import Contribution, EmbeddingGrads, OuterProducts, PerSampleGrads, unflatten_rows
from tengrad_triton.sharding.shards import Whole


@dataclass(frozen=True)
class Cut:
    """The outputs of one parameter that this process has.

    Attributes:
        shards: the processes.
        shape: of the whole parameter.
    """

    shards: Whole
    shape: torch.Size

    @property
    def outputs(self) -> tuple[int, int]:
        """Return the first of them, and the one behind the last."""
        return self.shards.own_outputs(self.shape[0])

    @property
    def is_empty(self) -> bool:
        """Whether the process has none."""
        first, end = self.outputs
        return first == end

    def of_parameter(self, x: Tensor) -> Tensor:
        """Return the part of a parameter-shaped tensor."""
        first, end = self.outputs
        return x[first:end]

    def of_call(self, call: Contribution, ops: Ops) -> Contribution:
        """Return what one call contributes to the rows of these outputs: contiguous tensors of their own."""
        first, end = self.outputs
        if isinstance(call, PerSampleGrads):
            return PerSampleGrads(call.j_NK.reshape(-1, *self.shape)[:, first:end].contiguous())
        if isinstance(call, EmbeddingGrads):
            inside_NP = (call.ids_NP >= first) & (call.ids_NP < end)
            ids_NP = torch.where(inside_NP, call.ids_NP - first, 0)
            return EmbeddingGrads(ids_NP, torch.where(inside_NP.unsqueeze(2), call.g_NPD, 0), end - first)
        if call.g_NGPO.shape[1] == 1:
            return OuterProducts(call.a, call.g_NGPO[..., first:end].contiguous())
        return self.of_call(PerSampleGrads(unflatten_rows(call.widened().sample_grads(ops), self.shape)), ops)

    def of_scale(self, scale: Scale) -> Scale:
        """Return D of these outputs, or one that couples them to those of other processes."""
        first, end = self.outputs
        values_Gn, basis_Gnn, inverse = scale.rows
        if basis_Gnn is not None or len(values_Gn) > 1:
            return CoupledScale(scale.rows, scale.columns, self)
        return Scale(Side(values_Gn[:, first:end], None, inverse[:, first:end]), scale.columns)


def cuts_of(layers: Sequence[LayerParams], shards: Whole) -> dict[str, dict[str, Cut]] | None:
    """Return what cuts every parameter, by its layer's name and its own; None where the process has whole ones."""
    if not shards.is_cut:
        return None
    return {layer.name: {name: Cut(shards, p.shape) for name, p in layer.parameters.items()} for layer in layers}


@dataclass(frozen=True)
class CoupledScale(Scale):
    """D of a whole parameter, of which this process needs the part of its own outputs."""

    cut: Cut


def own_scale(scales: Scales, shards: Whole, target: Target) -> Scale | None:
    """Return D of what a step updates of a parameter; None if it is the identity."""
    scale = scales.get(target.layer, {}).get(target.param_name)
    if scale is None or not shards.is_cut or target.whole is None:
        return scale
    return Cut(shards, target.whole).of_scale(scale)


def divided(scales: Sequence[CoupledScale], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the processes' own parts of D⁻¹ x."""
    return _of_whole(scales, tensors, lambda scale: scale.inverse)


def divide(scale: Scale, x: Tensor) -> Tensor:
    """Return D⁻¹ x of one parameter-shaped tensor."""
    if isinstance(scale, CoupledScale):
        return divided([scale], [x])[0]
    return scale.inverse.of_parameter(x) if x.numel() else x


def multiplied(scales: Sequence[CoupledScale], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the processes' own parts of D x."""
    return _of_whole(scales, tensors, Scale.itself)


def _of_whole(
    scales: Sequence[CoupledScale], tensors: Sequence[Tensor], by: Callable[[Scale], Multiplier]
) -> list[Tensor]:
    if not scales:
        return []
    whole = scales[0].cut.shards.gathered(tensors, [scale.cut.shape[0] for scale in scales])
    return [
        scale.cut.of_parameter(by(scale).of_parameter(x)).contiguous() for scale, x in zip(scales, whole, strict=True)
    ]


def cut_calls(batches: MicroBatches, cut: Cut, ops: Ops, by: Multiplier | None) -> MicroBatches:
    """Return the calls' contributions to the own outputs, those of L J_n M in place of the rows J_n."""

    def own(call: Contribution) -> Contribution:
        if by is None:
            return cut.of_call(call, ops)
        if isinstance(call, OuterProducts) and call.g_NGPO.shape[1] == 1:
            return cut.of_call(by.of_outer_products(call), ops)
        return cut.of_call(PerSampleGrads(unflatten_rows(explicit_rows(call, ops, by), cut.shape)), ops)

    return [[own(call) for call in calls] for calls in batches]
