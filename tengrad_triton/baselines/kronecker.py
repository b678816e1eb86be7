"""Which layers have Kronecker factors, and the matrix that such a layer's weight and bias form together.

Dimensions: N samples, G groups, P positions (pixels or tokens), K entries of a flat gradient, O outputs of a group, and
I inputs of a group. If a layer has a bias, I also counts the constant input 1 that the bias multiplies (the homogeneous
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
    """A weight whose gradients are sums of outer products, and the bias of the same layer, if there is one.

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
    def param_names(self) -> list[str]:
        """Return the parameters' names within their module."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def to_matrix(self, tensors: Mapping[str, Tensor], groups: int, dtype: torch.dtype) -> Tensor:
        """Return v_GOI, the matrix of tensors in the parameters' shapes, which are given by the parameters' names."""
        weight_OTI = matrix_view(tensors[self.weight])
        parts = [weight_OTI.reshape(groups, weight_OTI.shape[0] // groups, -1)]
        if self.bias is not None:
            parts.append(tensors[self.bias].reshape(groups, -1, 1))
        return torch.cat(parts, 2).to(dtype)

    def from_matrix(self, v_GOI: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors whose `to_matrix` is ``v_GOI``, with the shapes and dtypes of the tensors in ``like``."""
        tensors = {param_name: torch.empty_like(like[param_name]) for param_name in self.param_names}
        weight_OTI = matrix_view(tensors[self.weight])
        inputs = weight_OTI.shape[1] * weight_OTI.shape[2]
        weight_OTI.copy_(v_GOI[..., :inputs].reshape(weight_OTI.shape))
        if self.bias is not None:
            tensors[self.bias].copy_(v_GOI[..., inputs].reshape(tensors[self.bias].shape))
        return tensors


@dataclass(frozen=True)
class LayerBatch:
    """The contributions of one step's calls to a layer.

    Attributes:
        layer: the layer.
        micro_batches: for each micro-batch, the contribution of each call to the rows of the weight.
    """

    layer: KroneckerLayer
    micro_batches: Sequence[Sequence[OuterProducts]]

    @property
    def calls(self) -> list[OuterProducts]:
        """Return the calls of all micro-batches."""
        return [call for calls in self.micro_batches for call in calls]


def layer_batches(contributions: Contributions, known: Sequence[KroneckerLayer]) -> list[LayerBatch]:
    """Return each layer that has Kronecker factors, with the contributions of a step's calls to it.

    A weight has Kronecker factors if all its calls contribute `OuterProducts` of one size. The bias with the matching
    name belongs to the same layer if `_bias_of` confirms it.

    Args:
        contributions: the contributions of one step.
        known: the layers found at earlier steps. They stay the same while their parameters take part, so that a batch
            with zero gradients does not change them.
    """
    found, known_by_name = [], {layer.name: layer for layer in known}
    for module, by_param_name in contributions.by_layer.items():
        for param_name, batches in by_param_name.items():
            sizes = {_sizes(call) for calls in batches for call in calls}
            if len(sizes) == 1 and None not in sizes:
                layer = known_by_name.get(full_name(module, param_name))
                if layer is None or not set(layer.param_names) <= set(by_param_name):
                    layer = KroneckerLayer(module, param_name, _bias_of(param_name, by_param_name))
                found.append(LayerBatch(layer, [_outer_products(calls) for calls in batches]))
    return found


def _sizes(call: Contribution) -> tuple[int, int, int] | None:
    """Return G, O and K, or None if the call contributes no outer products."""
    return (call.g_NGPO.shape[1], call.outputs, call.entries) if isinstance(call, OuterProducts) else None


def _outer_products(calls: Sequence[Contribution]) -> list[OuterProducts]:
    return [call.widened() for call in calls if isinstance(call, OuterProducts)]


def _bias_of(param_name: str, by_param_name: Mapping[str, MicroBatches]) -> str | None:
    """Return the name of the bias that belongs to a weight, or None.

    A bias belongs to the weight if its J_n is Σ_p g_np with the g of the weight. In two cases a bias has the matching
    name but does not belong to the weight:

    - Several layers share the weight, and each has a bias of its own.
    - The layer is a transposed convolution: the output gradients are a there, not g.
    """
    name = param_name.replace("weight", "bias")
    if name == param_name or name not in by_param_name:
        return None
    g, bias_calls = [call.g_NGPO for call in _outer_products(by_param_name[param_name][0])], by_param_name[name][0]
    explicit = [call.j_NK.flatten(1) for call in bias_calls if isinstance(call, PerSampleGrads)]
    outputs = g[0].shape[1] * g[0].shape[3]
    if len(explicit) < len(bias_calls) or any(j_NK.shape[1] != outputs for j_NK in explicit):
        return None
    j_NK = torch.stack(explicit).sum(0)
    sum_NK, size_NK = _sum_over_positions(g), _sum_over_positions([g_NGPO.abs() for g_NGPO in g])
    # √eps is far above rounding errors and far below the difference of unrelated numbers. NaN counts as equal.
    differs = (j_NK - sum_NK).abs() > torch.finfo(j_NK.dtype).eps ** 0.5 * size_NK
    return None if differs.any() else name


def _sum_over_positions(g: Sequence[Tensor]) -> Tensor:
    """Return Σ_p g_np over the positions of all calls: [N, G·O]."""
    return torch.stack([g_NGPO.sum(2).flatten(1) for g_NGPO in g]).sum(0)
