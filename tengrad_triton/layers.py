"""The canonical form: what one use of a layer contributes to the per-sample gradients of its parameters.

This is the only module that knows layer types. After it there are outer products and explicit rows.

Dimensions: N samples, G groups, P positions (pixels or tokens; 1 for a plain linear layer), I inputs and O outputs of a
group, K entries of a flat gradient; C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tengrad_triton import kernels
from tengrad_triton.kernels.sample_grads import unfold


@dataclass(frozen=True)
class Windows:
    """A padded image x_NCHW seen through a convolution's windows: a_NGPI with I = (kh, kw, C / groups), unformed."""

    x_NCHW: Tensor
    kernel_size: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int

    def unfold(self) -> Tensor:
        """Return a_NGPI."""
        return unfold(self.x_NCHW, self.kernel_size, self.stride, self.dilation, self.groups)

    def pack(self) -> dict[str, Any]:
        """Return the arguments that make the same object."""
        return {
            "x_NCHW": self.x_NCHW,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def inputs(self) -> int:
        """Return I."""
        return self.kernel_size[0] * self.kernel_size[1] * self.x_NCHW.shape[1] // self.groups


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

    def sample_grads(self, ops: Any = kernels) -> Tensor:
        """Return j_NK, the explicit per-sample gradients."""
        if not isinstance(self.a, Windows):
            return ops.sample_grads(self.a, self.g_NGPO)
        view, n = self.a, len(self.g_NGPO)
        g_NOP = self.g_NGPO.mT.reshape(n, -1, self.g_NGPO.shape[2])
        height = (view.x_NCHW.shape[2] - view.dilation[0] * (view.kernel_size[0] - 1) - 1) // view.stride[0] + 1
        g_NOHW = g_NOP.unflatten(2, (height, -1))
        return ops.conv_sample_grads(view.x_NCHW, g_NOHW, view.kernel_size, view.stride, view.dilation, view.groups)


@dataclass(frozen=True)
class Explicit:
    """J_n itself, as rows of j_NK, in the parameter's own order: biases, elementwise scales."""

    j_NK: Tensor


Canonical = Mapping[str, Outer | Explicit]
"""The parameters' names within their layer, and what one use of the layer contributes to each."""


def joined(uses: Sequence[Sequence[Outer]]) -> Outer:
    """Return one outer product for all uses: along P within a micro-batch, along N between them (P padded by zeros)."""
    if len(uses) == 1 and len(uses[0]) == 1:
        return uses[0][0]
    if all(len(batch) == 1 for batch in uses) and (windows := _same_windows([batch[0].a for batch in uses])):
        return Outer(windows, torch.cat([batch[0].g_NGPO for batch in uses]))
    unfolded = [[use.a.unfold() if isinstance(use.a, Windows) else use.a for use in batch] for batch in uses]
    a = [torch.cat(batch, dim=2) for batch in unfolded]
    g = [torch.cat([use.g_NGPO for use in batch], dim=2) for batch in uses]
    positions = max(part.shape[2] for part in a)
    return Outer(*(torch.cat([F.pad(t, (0, 0, 0, positions - t.shape[2])) for t in parts]) for parts in (a, g)))


def _same_windows(views: Sequence[Tensor | Windows]) -> Windows | None:
    """Return one view of all samples, where all are the same windows of images of one size."""
    first = views[0]
    if not isinstance(first, Windows) or not all(isinstance(view, Windows) for view in views):
        return None
    alike = {view.x_NCHW.shape[1:] for view in views}  # type: ignore[union-attr]
    return replace(first, x_NCHW=torch.cat([view.x_NCHW for view in views])) if len(alike) == 1 else None  # type: ignore[union-attr]


@singledispatch
def canonical(layer: nn.Module, x: Tensor, grad_y: Tensor) -> Canonical:
    """Return the canonical form of one use of ``layer``: input ``x``, derivative ``grad_y`` of each sample's own loss.

    Both have the samples as their first dimension. Register a rule for a layer of your own with
    ``@canonical.register``; it must cover every parameter that the layer owns directly.

    Raises:
        TypeError: there is no rule for this type.
    """
    raise TypeError(f"no rule for {type(layer).__name__}; register one with @canonical.register")


@canonical.register
def _(layer: nn.Linear, x: Tensor, grad_y: Tensor) -> Canonical:
    a_NGPI = x.reshape(len(x), 1, -1, layer.in_features)
    g_NGPO = grad_y.reshape(len(x), 1, -1, layer.out_features)
    return {"weight": Outer(a_NGPI, g_NGPO), "bias": Explicit(g_NGPO.sum((1, 2)))}


@canonical.register
def _(layer: nn.Conv2d, x: Tensor, grad_y: Tensor) -> Canonical:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # torch keeps the padding of every spelling here (numbers, 'same', 'valid'), last dimension first, as F.pad wants it
    padded = F.pad(x, list(layer._reversed_padding_repeated_twice), mode=mode)
    view = Windows(padded, list(layer.kernel_size), list(layer.stride), list(layer.dilation), layer.groups)
    g_NGPO = grad_y.reshape(len(x), layer.groups, layer.out_channels // layer.groups, -1).mT
    return {"weight": Outer(view, g_NGPO), "bias": Explicit(grad_y.sum((2, 3)))}


_HARMLESS_OVERRIDES = frozenset({"extra_repr", "reset_parameters", "__init__", "__repr__"})


def why_no_rule(layer: nn.Module) -> str | None:
    """Return why no rule describes what ``layer`` computes, or None where one does.

    A rule describes the type it is registered for and the subclasses that compute the same thing. A subclass with a
    forward of its own, or a parametrized weight, is another layer.
    """
    known = next((c for c in type(layer).__mro__ if c in canonical.registry and c is not object), None)
    if known is None:
        return f"no rule for {type(layer).__name__}"
    if is_parametrized(layer):
        return "parametrized"
    inherited = {name for name in dir(known) if callable(getattr(known, name))} - _HARMLESS_OVERRIDES
    younger = type(layer).__mro__[: type(layer).__mro__.index(known)]
    own = [name for cls in younger for name in vars(cls) if name in inherited] + [
        n for n in vars(layer) if n == "forward"
    ]
    return f"{type(layer).__name__} has its own {own[0]}" if own else None


def matrix_view(parameter: Tensor) -> Tensor:
    """Return a view [O, K, I] of a parameter-shaped tensor in the canonical order: outputs, kernel pixels, inputs."""
    if parameter.dim() < 2:
        return parameter.view(-1, 1, 1)
    return parameter.unsqueeze(1) if parameter.dim() == 2 else parameter.view(*parameter.shape[:2], -1).mT
