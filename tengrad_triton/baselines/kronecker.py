"""Which layers have Kronecker factors, and the matrix that such a layer's weight and bias form together.

Dimensions: N samples, G groups, P positions (pixels or tokens), K entries of a flat gradient, O outputs of a group, and
I inputs of a group. Where a layer has a bias, I counts the constant input 1 that the bias multiplies (the homogeneous
coordinate), which comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import full_name
from tengrad_triton.curvature.concat import MicroBatches
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.layers import Contribution, OuterProducts, PerSampleGrads, matrix_view


@dataclass(frozen=True)
class KroneckerLayer:
    """A weight whose gradients are sums of outer products, and the bias that is added to its outputs.

    Attributes:
        module: the name of the module that owns both.
        weight: the weight's name within the module.
        bias: the bias's name within the module; None if there is no bias.
    """

    module: str
    weight: str
    bias: str | None

    @property
    def name(self) -> str:
        """Return the weight's name in the model."""
        return full_name(self.module, self.weight)

    @property
    def labels(self) -> list[str]:
        """Return the parameters' names within their module."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def to_matrix(self, tensors: Mapping[str, Tensor], groups: int, dtype: torch.dtype) -> Tensor:
        """Return v_GOI, the matrix of parameter-shaped tensors, which are given by the parameters' names."""
        weight_OTI = matrix_view(tensors[self.weight])
        parts = [weight_OTI.reshape(groups, weight_OTI.shape[0] // groups, -1)]
        if self.bias is not None:
            parts.append(tensors[self.bias].reshape(groups, -1, 1))
        return torch.cat(parts, 2).to(dtype)

    def from_matrix(self, v_GOI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of which `to_matrix` makes ``v_GOI``, each with shape and dtype of that in ``like``."""
        tensors = {label: torch.empty_like(like[label]) for label in self.labels}
        weight_OTI = matrix_view(tensors[self.weight])
        inputs = weight_OTI.shape[1] * weight_OTI.shape[2]
        weight_OTI.copy_(v_GOI[..., :inputs].reshape(weight_OTI.shape))
        if self.bias is not None:
            tensors[self.bias].copy_(v_GOI[..., inputs].reshape(tensors[self.bias].shape))
        return tensors


@dataclass(frozen=True)
class LayerBatch:
    """What the calls of one step contribute to a layer.

    Attributes:
        layer: the layer.
        micro_batches: the outer products of its weight, a list for each micro-batch, an entry for each call in it.
    """

    layer: KroneckerLayer
    micro_batches: Sequence[Sequence[OuterProducts]]

    @property
    def calls(self) -> list[OuterProducts]:
        """Return the calls of all micro-batches."""
        return [call for calls in self.micro_batches for call in calls]


def layer_batches(contributions: Contributions, known: Sequence[KroneckerLayer]) -> list[LayerBatch]:
    """Return every layer that has Kronecker factors, with what the calls of a step contribute to it.

    A weight has Kronecker factors if all its calls contribute `OuterProducts` of one size. The bias that is named after
    it joins it if `_bias_of` confirms that the two belong together.

    Args:
        contributions: of one step.
        known: the layers found before. Each is found again as it is, as long as its parameters take part: a layer must
            not change because a batch happens to have zero gradients.
    """
    found, known_by_name = [], {layer.name: layer for layer in known}
    for module, by_label in contributions.by_layer.items():
        for label, batches in by_label.items():
            sizes = {_sizes(call) for calls in batches for call in calls}
            if len(sizes) == 1 and None not in sizes:
                layer = known_by_name.get(full_name(module, label))
                if layer is None or not set(layer.labels) <= set(by_label):
                    layer = KroneckerLayer(module, label, _bias_of(label, by_label))
                found.append(LayerBatch(layer, [_outer_products(calls) for calls in batches]))
    return found


def _sizes(call: Contribution) -> tuple[int, int, int] | None:
    """Return G, O and K; None for what is no outer product."""
    return (call.g_NGPO.shape[1], call.outputs, call.entries) if isinstance(call, OuterProducts) else None


def _outer_products(calls: Sequence[Contribution]) -> list[OuterProducts]:
    return [call for call in calls if isinstance(call, OuterProducts)]


def _bias_of(label: str, by_label: Mapping[str, MicroBatches]) -> str | None:
    """Return the name of the bias that belongs to a weight: its J_n is Σ_p g_np with the g of the weight.

    A bias whose name fits may still not belong to the weight: where layers with biases of their own share the weight,
    and in a transposed convolution, where the derivatives of the output are a and not g.
    """
    name = label.replace("weight", "bias")
    if name == label or name not in by_label:
        return None
    g, bias_calls = [call.g_NGPO for call in _outer_products(by_label[label][0])], by_label[name][0]
    explicit = [call.j_NK.flatten(1) for call in bias_calls if isinstance(call, PerSampleGrads)]
    outputs = g[0].shape[1] * g[0].shape[3]
    if len(explicit) < len(bias_calls) or any(j_NK.shape[1] != outputs for j_NK in explicit):
        return None
    j_NK = torch.stack(explicit).sum(0)
    sum_NK, size_NK = _sum_over_positions(g), _sum_over_positions([g_NGPO.abs() for g_NGPO in g])
    # The square root of the precision is far above rounding and far below another quantity. NaN refuses nothing.
    differs = (j_NK - sum_NK).abs() > torch.finfo(j_NK.dtype).eps ** 0.5 * size_NK
    return None if differs.any() else name


def _sum_over_positions(g: Sequence[Tensor]) -> Tensor:
    """Return Σ_p g_np over the positions of all calls: [N, G·O]."""
    return torch.stack([g_NGPO.sum(2).flatten(1) for g_NGPO in g]).sum(0)
