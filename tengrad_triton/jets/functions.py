"""The derivatives of a network with respect to its inputs, for equations that hold at points.

Forward mode: every layer is called once, on the value and its derivatives together (Taylor mode; with only the sum of
the second derivatives the forward Laplacian of Li et al., 2024, arXiv:2307.08214). Nothing is differentiated
backward, so one backward pass of autograd is enough for gradients with respect to parameters.

Dimensions: N points, D coordinates (the chosen ones in results), O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor

from tengrad_triton.jets.jet import Jet, jet_of
from tengrad_triton.jets.rules import through


class FirstDerivatives(NamedTuple):
    """A function's values and first derivatives at points.

    Attributes:
        value: u, [N, O].
        first: ∂u/∂x_d, [N, D, O], in the order of the chosen coordinates.
    """

    value: Tensor
    first: Tensor


class Derivatives(NamedTuple):
    """A function's values, first and unmixed second derivatives at points.

    ``d.first[:, 0]`` and ``d.second[:, 0]`` have the shape of ``d.value``.

    Attributes:
        value: u, [N, O].
        first: ∂u/∂x_d, [N, D, O], in the order of the chosen coordinates.
        second: ∂²u/∂x_d², [N, D, O].
    """

    value: Tensor
    first: Tensor
    second: Tensor


@overload
def derivatives(
    u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None, second: Literal[True] = True
) -> Derivatives: ...


@overload
def derivatives(
    u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None, *, second: Literal[False]
) -> FirstDerivatives: ...


@overload
def derivatives(
    u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None, *, second: bool
) -> Derivatives | FirstDerivatives: ...


def derivatives(
    u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None, second: bool = True
) -> Derivatives | FirstDerivatives:
    """Return u with its first and unmixed second derivatives with respect to the coordinates of the points.

    All are exact. They can be differentiated further: with respect to the parameters of u, and to the points. This
    works under `torch.func` (`vmap`, `grad`, `functional_call` and so on), `torch.no_grad` and `torch.compile`.

    A `Sequential` of linear layers and elementwise activations is fastest. Anything else, in it or in its place, is
    differentiated by `torch.func`, which costs more: a module with a ``forward`` of its own, hooks, any function.
    `register_activation` and `register` give a module's type a rule.

    The points are taken as independent of each other. Where u mixes them, as batch normalization does in training, the
    derivatives are those along a motion of all points at once. Batch normalization with running statistics has to be in
    evaluation, because `torch.func` changes none of a module's buffers.

    Args:
        u: a module, or a function of a batch of points [N, D]. It returns [N, O], or [N], which is taken as [N, 1].
        x_ND: the points, [N, D], of a floating-point type.
        coordinates: which coordinates, each from 0 to D − 1; all by default. Take only those that you need.
        second: whether second derivatives are computed.

    Returns:
        `Derivatives`: ``value`` [N, O], ``first`` [N, D, O] and ``second`` [N, D, O], with D the number of chosen
        coordinates; `FirstDerivatives`, without ``second``, if ``second`` is False.

    Raises:
        TypeError: the points are no floating-point tensor, or u returns no tensor.
        ValueError: the points are not [N, D], a coordinate is none of theirs, or the output is not [N, O].
        NotImplementedError: u calls a function whose nested derivatives PyTorch gets wrong, as `torch.linalg.det`.
    """
    chosen = checked_coordinates(x_ND, coordinates)
    jet = jet_at(u, x_ND, chosen, len(chosen) if second else 0)
    first = jet.first.movedim(0, 1)
    return (
        Derivatives(jet.value[0], first, jet.second.movedim(0, 1)) if second else FirstDerivatives(jet.value[0], first)
    )


def laplacian(u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int] | None = None) -> Tensor:
    """Return Δu = Σ_d ∂²u/∂x_d² at the points.

    As `derivatives`, but every layer carries the sum of the second derivatives instead of each.

    Args:
        u: a module, or a function of a batch of points [N, D]. It returns [N, O], or [N], which is taken as [N, 1].
        x_ND: the points, [N, D], of a floating-point type.
        coordinates: the coordinates d of the sum, each from 0 to D − 1; all by default. For a heat equation in
            (t, x, y) these are ``[1, 2]``.

    Returns:
        [N, O].

    Raises:
        TypeError: the points are no floating-point tensor, or u returns no tensor.
        ValueError: the points are not [N, D], a coordinate is none of theirs, or the output is not [N, O].
        NotImplementedError: u calls a function whose nested derivatives PyTorch gets wrong, as `torch.linalg.det`.
    """
    return jet_at(u, x_ND, checked_coordinates(x_ND, coordinates), 1).second[0]


def jet_at(u: Callable[[Tensor], Tensor], x_ND: Tensor, coordinates: Sequence[int], seconds: int) -> Jet:
    """Return the jet of u at the points, [1 + D + S, N, O] in parts, with S = ``seconds`` second derivatives.

    Raises:
        ValueError: the output of u is neither [N, O] nor [N].
    """
    jet = through(u, jet_of(x_ND, coordinates, seconds)).over_points()
    shape = jet.value.shape[1:]
    if len(shape) not in (1, 2) or shape[0] != len(x_ND):
        raise ValueError(
            f"u returned {list(shape)} for {len(x_ND)} points, but a function of points [N, D] returns [N, O]: "
            "keep the points as the first dimension, and flatten the outputs"
        )
    return jet if len(shape) == 2 else Jet(*(part[..., None] for part in jet))


def checked_coordinates(x_ND: Tensor, coordinates: Sequence[int] | None) -> Sequence[int]:
    """Return the chosen coordinates of the points.

    Raises:
        TypeError: the points are no floating-point tensor.
        ValueError: the points are not [N, D], or a coordinate is none of theirs or chosen twice.
    """
    if not isinstance(x_ND, Tensor) or not x_ND.is_floating_point():
        came = x_ND.dtype if isinstance(x_ND, Tensor) else type(x_ND).__name__
        raise TypeError(
            f"the points came as {came}, but derivatives need a floating-point tensor: x.float() or x.double()"
        )
    if x_ND.ndim != 2:
        raise ValueError(f"the points came as {list(x_ND.shape)}, but [N, D] was expected: a single point is x[None]")
    D = x_ND.shape[1]
    chosen = range(D) if coordinates is None else list(coordinates)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(D)):
        raise ValueError(
            f"coordinates came as {coordinates}, but points {list(x_ND.shape)} have coordinates 0 to {D - 1}: "
            "name at least one of them, each once"
        )
    return chosen
