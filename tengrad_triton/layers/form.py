"""The canonical form: what one use of a layer contributes to the per-sample gradients of its parameters.

Layer types are known within this package only. After it there are outer products, lookups and explicit rows.

Dimensions: N samples, G groups, P positions (pixels or tokens; 1 for a plain linear layer), I inputs and O outputs of a
group, K entries of a flat gradient; V rows of a table, D entries of a row; C channels, H and W pixels.
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
class Windows:
    """An image x_NCHW seen through a convolution's windows: a_NGPI with I = (kh, kw, C / groups), unformed.

    Padding by anything but zeros is part of the image.
    """

    x_NCHW: Tensor
    kernel_size: list[int]
    sliding: ConvGeometry

    def unfold(self) -> Tensor:
        """Return a_NGPI."""
        return self.sliding.unfold(self.x_NCHW, self.kernel_size)

    def pack(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which `unpack` makes the same object."""
        return {"x_NCHW": self.x_NCHW, "kernel_size": self.kernel_size, "sliding": self.sliding.numbers}

    @staticmethod
    def unpack(x_NCHW: Tensor, kernel_size: list[int], sliding: list[int]) -> Windows:
        """Return what was packed."""
        return Windows(x_NCHW, kernel_size, next(conv_geometries(sliding)))

    @property
    def inputs(self) -> int:
        """Return I."""
        return self.kernel_size[0] * self.kernel_size[1] * self.x_NCHW.shape[1] // self.sliding.groups


@dataclass(frozen=True)
class Outer:
    """J_n = Σ_p g_np a_npᵀ in every group (paper, Lemma 1): a weight that multiplies what its layer sees at P places.

    ``a`` is a_NGPI, or the `Windows` from which it can be unfolded. ``g_NGPO`` is the derivative of each sample's own
    loss by the layer's output. J_n lies over (G, O, I), the weight's own order but for a convolution, where the input
    channel comes last.
    """

    a: Tensor | Windows
    g_NGPO: Tensor

    @property
    def outputs(self) -> int:
        """Return O."""
        return self.g_NGPO.shape[3]

    @property
    def entries(self) -> int:
        """Return the entries of J_n."""
        inputs = self.a.inputs if isinstance(self.a, Windows) else self.a.shape[3]
        return self.g_NGPO.shape[1] * self.outputs * inputs

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return j_NK, the explicit per-sample gradients."""
        if not isinstance(self.a, Windows):
            return ops.sample_grads(self.a, self.g_NGPO)
        view, slides = self.a, self.a.sliding
        numbers = view.kernel_size, list(slides.stride), list(slides.dilation), slides.groups
        return ops.conv_sample_grads(slides.padded(view.x_NCHW), self.g_NOHW(view), *numbers)

    def g_NOHW(self, view: Windows) -> Tensor:
        """Return the derivatives by the pixels of the convolution's output."""
        g_NOP = self.g_NGPO.mT.reshape(len(self.g_NGPO), -1, self.g_NGPO.shape[2])
        return g_NOP.unflatten(2, view.sliding.pixels(view.x_NCHW.shape[2:], view.kernel_size))


@dataclass(frozen=True)
class Lookup:
    """J_n = Σ_p e_i gᵀ with i = ids_NP[n, p] and g = g_NPD[n, p]: a table of V rows that are looked up."""

    ids_NP: Tensor
    g_NPD: Tensor
    rows: int

    @property
    def entries(self) -> int:
        """Return the entries of J_n."""
        return self.rows * self.g_NPD.shape[2]

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return j_NK, the explicit per-sample gradients."""
        return self.sample_rows(0, self.rows).flatten(1)

    def sample_rows(self, first: int, end: int) -> Tensor:
        """Return j_NVD for the table's rows from ``first`` to before ``end``."""
        n, _, entries = self.g_NPD.shape
        inside = (self.ids_NP >= first) & (self.ids_NP < end)
        slot_NP = torch.where(inside, self.ids_NP - first, end - first)  # what is outside goes into a row that is cut
        samples_N1 = torch.arange(n, device=slot_NP.device)[:, None]
        j = self.g_NPD.new_zeros(n * (end - first + 1), entries)
        j.index_add_(0, (samples_N1 * (end - first + 1) + slot_NP).flatten(), self.g_NPD.flatten(0, 1))
        return j.view(n, end - first + 1, entries)[:, :-1]


@dataclass(frozen=True)
class Explicit:
    """J_n itself, shaped [N, …] like the parameter or flat in its order: biases, elementwise scales, anything else."""

    j_NK: Tensor

    @property
    def entries(self) -> int:
        """Return the entries of J_n."""
        return self.j_NK[0].numel()


Form = Outer | Lookup | Explicit
Canonical = Mapping[str, Form]
"""The parameters' names within their layer, and what one use of the layer contributes to each."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer that takes several tensors.

    Attributes:
        args: detached from the graph.
        kwargs: likewise.
        rng: the state of the random number generator before the call, where the layer draws from it.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    rng: Tensor | None = None


Inputs = Tensor | Call
"""A layer's input where it takes one tensor, or the whole call."""


@singledispatch
def canonical(layer: nn.Module, x: Any, grad_y: Any) -> Canonical:
    """Return the canonical form of one use of ``layer``: input ``x``, derivative ``grad_y`` of each sample's own loss.

    Both have the samples as their first dimension. A layer that is called with several tensors gets a `Call` as ``x``;
    one that returns several gets a list of derivatives, None where there is none. Register a rule for a layer of your
    own with ``@canonical.register``; it must cover every parameter that the layer owns directly.

    Raises:
        TypeError: there is no rule for this type.
    """
    raise TypeError(f"no rule for {type(layer).__name__}; register one with @canonical.register")


def arguments(layer: nn.Module, x: Inputs) -> dict[str, Any]:
    """Return a call's arguments by the names of the layer's ``forward``, defaults included."""
    args, kwargs = (x.args, x.kwargs) if isinstance(x, Call) else ((x,), {})
    bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if value is not layer}


def input_of(args: Any, kwargs: Any) -> Tensor:
    """Return the first tensor among a call's arguments."""
    return next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def matrix_view(parameter: Tensor) -> Tensor:
    """Return a view [O, K, I] of a parameter-shaped tensor in the canonical order: outputs, kernel pixels, inputs."""
    if parameter.dim() < 2:
        return parameter.view(-1, 1, 1)
    return parameter.unsqueeze(1) if parameter.dim() == 2 else parameter.view(*parameter.shape[:2], -1).mT


def canonical_rows(j_NK: Tensor) -> Tensor:
    """Return rows shaped [N, …] like a parameter flat, in the order of `matrix_view`."""
    return (j_NK.flatten(3).mT if j_NK.dim() > 3 else j_NK).flatten(1)
