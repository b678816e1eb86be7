"""The canonical form: what one call of a layer contributes to J_n, the row of sample n, of each of its parameters.

A rule brings each layer type to one of three forms: outer products, embedding gradients or per-sample gradients. Code
outside of this package sees these forms and no layer types.

Dimensions: N samples, G groups, P positions (pixels or tokens; 1 for a plain linear layer), I inputs and O outputs of a
group, K entries of a flat gradient; V vectors of an embedding table, D entries of such a vector; C channels, H and W
pixels; T taps (pixels) of a convolution's kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tengrad_triton import kernels
from tengrad_triton.kernels.conv_geometry import ConvGeometry, conv_geometries
from tengrad_triton.kernels.dispatch import widen


@dataclass(frozen=True)
class ConvInput:
    """The input of a convolution, from which the patches a_NGPI follow, I = (kernel height, kernel width, C / groups).

    A patch is the part of the input that one output position multiplies. Unfolding the input into patches repeats each
    pixel once for every patch that contains it. Ops that read the patches directly from ``x_NCHW`` save that memory;
    `unfold` returns the patches for all other code.

    Attributes:
        x_NCHW: the input [N, C, H, W]. It already includes padding with values other than zeros.
        kernel_size: height and width of the kernel, in pixels.
        geometry: stride, zero padding, dilation and groups.
    """

    x_NCHW: Tensor
    kernel_size: list[int]
    geometry: ConvGeometry

    def unfold(self) -> Tensor:
        """Return a_NGPI: the entries of every patch."""
        return self.geometry.unfold(self.x_NCHW, self.kernel_size)

    def pack(self) -> dict[str, Any]:
        """Return the fields as tensors and numbers, from which `unpack` makes an equal object."""
        return {"x_NCHW": self.x_NCHW, "kernel_size": self.kernel_size, "geometry": self.geometry.numbers}

    @staticmethod
    def unpack(x_NCHW: Tensor, kernel_size: list[int], geometry: list[int]) -> ConvInput:
        """Return the object whose `pack` returned these fields."""
        return ConvInput(x_NCHW, kernel_size, next(conv_geometries(geometry)))

    def widened(self) -> ConvInput:
        """Return the input in float32 where it is in half precision."""
        return replace(self, x_NCHW=widen(self.x_NCHW))

    @property
    def inputs(self) -> int:
        """Return I, the number of entries of a patch in one group."""
        return self.kernel_size[0] * self.kernel_size[1] * self.x_NCHW.shape[1] // self.geometry.groups


@dataclass(frozen=True)
class OuterProducts:
    """The rows J_n = Σ_p g_np a_npᵀ, in every group, of a weight that multiplies P positions.

    Equation: docs/math.md, M1. Source: the TENGraD paper, equation 8 and Lemma 1.

    Attributes:
        a: the inputs a_NGPI of the weight, [N, G, P, I], or the `ConvInput` that unfolds to them.
        g_NGPO: the output gradients [N, G, P, O]: derivatives of each sample's own loss, which is not divided by the
            size of the batch, with respect to the layer's output.

    Both factors may be in half precision, if that holds them exactly.

    The entries of J_n are in the order (G, O, I), which is also that of `matrix_view`. The weight itself has this
    order, except for a convolution: its input channel comes last in J_n, but before the taps in the weight.
    """

    a: Tensor | ConvInput
    g_NGPO: Tensor

    def widened(self) -> OuterProducts:
        """Return the factors in float32 where they are in half precision."""
        a = self.a.widened() if isinstance(self.a, ConvInput) else widen(self.a)
        return OuterProducts(a, widen(self.g_NGPO))

    @property
    def samples(self) -> int:
        """Return N."""
        return len(self.g_NGPO)

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
        """Return the explicit rows j_NK, in float32 at least, computed by the ops that ``ops`` has as attributes."""
        if not isinstance(self.a, ConvInput):
            return ops.sample_grads(self.a, self.g_NGPO)
        geometry = self.a.geometry
        sizes = self.a.kernel_size, list(geometry.stride), list(geometry.dilation), geometry.groups
        return ops.conv_sample_grads(geometry.padded(self.a.x_NCHW), self.g_NOHW(self.a), *sizes)

    def g_NOHW(self, conv_input: ConvInput) -> Tensor:
        """Return the output gradients as an image [N, G·O, H, W] of the convolution's output pixels."""
        g_NOP = self.g_NGPO.mT.reshape(len(self.g_NGPO), -1, self.g_NGPO.shape[2])
        return g_NOP.unflatten(2, conv_input.geometry.pixels(conv_input.x_NCHW.shape[2:], conv_input.kernel_size))


@dataclass(frozen=True)
class EmbeddingGrads:
    """The rows J_n = Σ_p e_i g_npᵀ, with i = ids_NP[n, p], of an embedding table [V, D].

    Position p of sample n reads vector i of the table, so J_n is zero for all vectors that sample n does not read. e_i
    is the i-th unit vector of length V; it is never formed. Equation: docs/math.md, M1.

    Attributes:
        ids_NP: the index of the vector that each position reads: integers [N, P] from 0 to V − 1.
        g_NPD: derivatives [N, P, D] of each sample's own loss with respect to the vector that was read.
        num_embeddings: V, the number of vectors of the table.
    """

    ids_NP: Tensor
    g_NPD: Tensor
    num_embeddings: int

    @property
    def samples(self) -> int:
        """Return N."""
        return len(self.ids_NP)

    @property
    def entries(self) -> int:
        """Return K = V·D, the number of entries of J_n."""
        return self.num_embeddings * self.g_NPD.shape[2]

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return the explicit rows j_NK. No op computes them, so ``ops`` is unused."""
        return self.sample_grads_between(0, self.num_embeddings).flatten(1)

    def sample_grads_between(self, first: int, end: int) -> Tensor:
        """Return j_NVD restricted to the table's vectors ``first`` to ``end`` − 1."""
        n, _, entries = self.g_NPD.shape
        inside = (self.ids_NP >= first) & (self.ids_NP < end)
        # Positions that read other vectors add to one more vector at the end, which is dropped.
        place_NP = torch.where(inside, self.ids_NP - first, end - first)
        samples_N1 = torch.arange(n, device=place_NP.device)[:, None]
        j = self.g_NPD.new_zeros(n * (end - first + 1), entries)
        j.index_add_(0, (samples_N1 * (end - first + 1) + place_NP).flatten(), self.g_NPD.flatten(0, 1))
        return j.view(n, end - first + 1, entries)[:, :-1]


@dataclass(frozen=True)
class PerSampleGrads:
    """The rows J_n themselves: of a bias, an elementwise scale or any other parameter (docs/math.md, M1).

    Attributes:
        j_NK: derivatives of each sample's own loss with respect to the parameter: [N, *parameter.shape], or [N, K]
            with the K entries in the order of the flattened parameter.
    """

    j_NK: Tensor

    @property
    def samples(self) -> int:
        """Return N."""
        return len(self.j_NK)

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
    """The arguments of one call of a layer or of the model; a rule gets them where its layer takes several tensors.

    Attributes:
        args: the positional arguments, with their tensors detached from the graph.
        kwargs: the keyword arguments, with their tensors detached.
        rng: the state of the random number generator before the call, for layers that draw random numbers; else None.
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


def matrix_shape(shape: torch.Size) -> tuple[int, int, int]:
    """Return the sizes (O, T, I) that `matrix_view` has of a parameter of this shape."""
    outputs, taps, inputs = matrix_view(torch.empty(shape, device="meta")).shape
    return outputs, taps, inputs


def matrix_view(parameter: Tensor) -> Tensor:
    """Return a view [O, T, I] of a parameter-shaped tensor: outputs, taps of a convolution's kernel (else 1), inputs.

    This is the order of the entries of J_n (see `OuterProducts`).
    """
    if parameter.dim() < 2:
        return parameter.view(-1, 1, 1)
    return parameter.unsqueeze(1) if parameter.dim() == 2 else parameter.view(*parameter.shape[:2], -1).mT


def flatten_rows(j_NK: Tensor) -> Tensor:
    """Return rows [N, *parameter.shape] flattened to [N, K], with the K entries in the order of `matrix_view`."""
    return (j_NK.flatten(3).mT if j_NK.dim() > 3 else j_NK).reshape(len(j_NK), -1)


def unflatten_rows(j_NK: Tensor, shape: torch.Size) -> Tensor:
    """Return rows [N, K], with the entries in the order of `matrix_view`, as [N, *shape]: `flatten_rows` undone."""
    if len(shape) < 3:
        return j_NK.reshape(len(j_NK), *shape)
    return j_NK.reshape(len(j_NK), shape[0], -1, shape[1]).mT.reshape(len(j_NK), *shape)
