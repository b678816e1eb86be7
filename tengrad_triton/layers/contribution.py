"""The canonical form: what one call of a layer contributes to the per-sample gradients of its parameters.

A rule brings each layer type to one of three forms: outer products, embedding gradients or per-sample gradients. Code
outside of this package sees these forms and no layer types.

Dimensions: N samples, G groups, P positions (pixels or tokens; 1 for a plain linear layer), I inputs and O outputs of a
group, K entries of a flat gradient; V rows of an embedding table, D entries of such a row; C channels, H and W pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tengrad_triton import kernels
from tengrad_triton.kernels.conv_geometry import ConvGeometry, conv_geometries


@dataclass(frozen=True)
class ConvInput:
    """The input of a convolution in place of its windows a_NGPI, I = (kernel height, kernel width, C / groups).

    Unfolding repeats each pixel once for every window that contains it. A kernel that reads the windows directly from
    ``x_NCHW`` avoids that memory; `unfold` makes the windows where no kernel does.

    Attributes:
        x_NCHW: the input [N, C, H, W]. Padding with other values than zeros has been added to it already.
        kernel_size: height and width of the kernel, in pixels.
        geometry: stride, zero padding, dilation and groups.
    """

    x_NCHW: Tensor
    kernel_size: list[int]
    geometry: ConvGeometry

    def unfold(self) -> Tensor:
        """Return a_NGPI: the entries of every window."""
        return self.geometry.unfold(self.x_NCHW, self.kernel_size)

    def pack(self) -> dict[str, Any]:
        """Return the fields as tensors and plain numbers, from which `unpack` makes an equal object."""
        return {"x_NCHW": self.x_NCHW, "kernel_size": self.kernel_size, "geometry": self.geometry.numbers}

    @staticmethod
    def unpack(x_NCHW: Tensor, kernel_size: list[int], geometry: list[int]) -> ConvInput:
        """Return the object whose `pack` returned these fields."""
        return ConvInput(x_NCHW, kernel_size, next(conv_geometries(geometry)))

    @property
    def inputs(self) -> int:
        """Return I, the number of entries of a window in one group."""
        return self.kernel_size[0] * self.kernel_size[1] * self.x_NCHW.shape[1] // self.geometry.groups


@dataclass(frozen=True)
class OuterProducts:
    """J_n = Σ_p g_np a_npᵀ in every group: the per-sample gradients of a weight that multiplies P positions.

    Equation: docs/math.md, M1. Source: the TENGraD paper, equation 8 and Lemma 1.

    Attributes:
        a: the inputs a_NGPI of the weight, [N, G, P, I], or the `ConvInput` that unfolds to them.
        g_NGPO: derivatives [N, G, P, O] of each sample's own loss with respect to the layer's output. The loss is the
            sample's own, not its share of a mean over the batch.

    The entries of J_n are in the order (G, O, I). That is the order of the weight itself, except for a convolution,
    whose input channel comes last here and before the kernel's pixels in the weight.
    """

    a: Tensor | ConvInput
    g_NGPO: Tensor

    @property
    def outputs(self) -> int:
        """Return O, the number of outputs of a group."""
        return self.g_NGPO.shape[3]

    @property
    def entries(self) -> int:
        """Return K = G·O·I, the number of entries of J_n."""
        inputs = self.a.inputs if isinstance(self.a, ConvInput) else self.a.shape[3]
        return self.g_NGPO.shape[1] * self.outputs * inputs

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return the explicit per-sample gradients j_NK, computed by the operations of ``ops``."""
        if not isinstance(self.a, ConvInput):
            return ops.sample_grads(self.a, self.g_NGPO)
        geometry = self.a.geometry
        sizes = self.a.kernel_size, list(geometry.stride), list(geometry.dilation), geometry.groups
        return ops.conv_sample_grads(geometry.padded(self.a.x_NCHW), self.g_NOHW(self.a), *sizes)

    def g_NOHW(self, conv_input: ConvInput) -> Tensor:
        """Return the derivatives as an image [N, G·O, H, W] over the output pixels of the convolution."""
        g_NOP = self.g_NGPO.mT.reshape(len(self.g_NGPO), -1, self.g_NGPO.shape[2])
        return g_NOP.unflatten(2, conv_input.geometry.pixels(conv_input.x_NCHW.shape[2:], conv_input.kernel_size))


@dataclass(frozen=True)
class EmbeddingGrads:
    """J_n = Σ_p e_i g_npᵀ with i = ids_NP[n, p]: the per-sample gradients of an embedding table [V, D].

    Position p of sample n reads row i of the table, so only these rows of J_n differ from zero. e_i is the i-th unit
    vector of length V; it is never formed. Equation: docs/math.md, M1.

    Attributes:
        ids_NP: which row of the table each position reads: integers [N, P] from 0 to V − 1.
        g_NPD: derivatives [N, P, D] of each sample's own loss with respect to the row that was read.
        num_embeddings: V, the number of rows of the table.
    """

    ids_NP: Tensor
    g_NPD: Tensor
    num_embeddings: int

    @property
    def entries(self) -> int:
        """Return K = V·D, the number of entries of J_n."""
        return self.num_embeddings * self.g_NPD.shape[2]

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return the explicit per-sample gradients j_NK. ``ops`` is not used: no kernel does this."""
        return self.sample_grads_between(0, self.num_embeddings).flatten(1)

    def sample_grads_between(self, first: int, end: int) -> Tensor:
        """Return j_NVD restricted to the table's rows ``first`` to ``end`` − 1."""
        n, _, entries = self.g_NPD.shape
        inside = (self.ids_NP >= first) & (self.ids_NP < end)
        slot_NP = torch.where(inside, self.ids_NP - first, end - first)  # all others share one slot, dropped below
        samples_N1 = torch.arange(n, device=slot_NP.device)[:, None]
        j = self.g_NPD.new_zeros(n * (end - first + 1), entries)
        j.index_add_(0, (samples_N1 * (end - first + 1) + slot_NP).flatten(), self.g_NPD.flatten(0, 1))
        return j.view(n, end - first + 1, entries)[:, :-1]


@dataclass(frozen=True)
class PerSampleGrads:
    """J_n itself: the per-sample gradients of a bias, an elementwise scale or any other parameter (docs/math.md, M1).

    Attributes:
        j_NK: derivatives of each sample's own loss with respect to the parameter: [N, *parameter.shape], or [N, K]
            with the K entries in the order of the flattened parameter.
    """

    j_NK: Tensor

    @property
    def entries(self) -> int:
        """Return K, the number of entries of J_n."""
        return self.j_NK[0].numel()


Contribution = OuterProducts | EmbeddingGrads | PerSampleGrads
"""What one call of a layer contributes to J_n of one parameter."""
Canonical = Mapping[str, Contribution]
"""The contribution of one call to each parameter, by the parameter's name within the layer."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer that takes several tensors.

    Attributes:
        args: the positional arguments, with their tensors detached from the graph.
        kwargs: the keyword arguments, likewise.
        rng: the state of the random number generator before the call, for layers that draw from it; None for others.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    rng: Tensor | None = None


Inputs = Tensor | Call
"""The input of a layer that takes one tensor, or the whole `Call` of a layer that takes several."""


@singledispatch
def canonical(layer: nn.Module, x: Any, grad_y: Any) -> Canonical:
    """Return what one call of ``layer`` contributes to J_n of each of its parameters (docs/math.md, M1).

    To add a rule for your own layer type, decorate a function of the same three arguments with
    ``@canonical.register``. The rule must return a contribution for every parameter that the layer owns directly.

    Args:
        layer: the layer that was called.
        x: its input [N, …], samples first; a `Call` where the layer takes several tensors.
        grad_y: the derivative [N, …] of each sample's own loss with respect to the output, shaped like the output; a
            list of them where the layer returns several tensors, with None for those that the loss does not depend on.

    Raises:
        TypeError: no rule is registered for this layer type.
    """
    raise TypeError(f"no rule for {type(layer).__name__}; register one with @canonical.register")


def arguments(layer: nn.Module, x: Inputs) -> dict[str, Any]:
    """Return the arguments of a call by their names in the layer's ``forward``, defaults included."""
    args, kwargs = (x.args, x.kwargs) if isinstance(x, Call) else ((x,), {})
    bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if value is not layer}


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors within nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def first_tensor(args: Any, kwargs: Any) -> Tensor:
    """Return the first tensor among the arguments of a call."""
    return tensors_in((args, kwargs))[0]


def matrix_view(parameter: Tensor) -> Tensor:
    """Return a view [O, T, I] of a parameter-shaped tensor in the canonical order: outputs, kernel pixels, inputs."""
    if parameter.dim() < 2:
        return parameter.view(-1, 1, 1)
    return parameter.unsqueeze(1) if parameter.dim() == 2 else parameter.view(*parameter.shape[:2], -1).mT


def canonical_rows(j_NK: Tensor) -> Tensor:
    """Return rows [N, *parameter.shape] flattened to [N, K], with the K entries in the order of `matrix_view`."""
    return (j_NK.flatten(3).mT if j_NK.dim() > 3 else j_NK).flatten(1)
