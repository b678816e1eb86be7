"""D and D⁻¹ of many parameters, for the gradients of many steps (docs/math.md, M17)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.curvature.shards.cut import CoupledScale, divided, multiplied
from tengrad_triton.curvature.sides import places_of_alike


class Metric:
    """D⁻¹ of several parameters, prepared for many gradients.

    Diagonal D take one call together. So do the matrices of parameters of equal sizes, where that is worth it. Those
    that couple the outputs of several processes take one message together.

    Args:
        scales: D of each parameter.
        parameters: tensors of the parameters' shapes and memory layouts.
    """

    def __init__(self, scales: Sequence[Scale], parameters: Sequence[Tensor]) -> None:
        self._scales = scales
        self._coupled = {place: scale for place, scale in enumerate(scales) if isinstance(scale, CoupledScale)}
        own = [place for place, x in enumerate(parameters) if x.numel() and place not in self._coupled]
        inverses = {place: scales[place].inverse for place in own}
        self._diagonal = [place for place, inverse in inverses.items() if inverse.is_diagonal]
        self._numbers = [inverses[place].as_parameter(parameters[place]) for place in self._diagonal]
        others = [place for place, inverse in inverses.items() if not inverse.is_diagonal]
        alike = places_of_alike([_form(place, inverses[place], parameters[place]) for place in others])
        batches = [[others[index] for index in own] for own in alike]
        self._batches = [(places, _joined([inverses[place] for place in places])) for places in batches]

    def inverse(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return D⁻¹ x of a parameter-shaped tensor x for each parameter."""
        scaled = dict(enumerate(tensors))  # those without entries stay
        coupled = divided(list(self._coupled.values()), [tensors[place] for place in self._coupled])
        scaled |= zip(self._coupled, coupled, strict=True)
        scaled |= dict(zip(self._diagonal, self._multiplied([tensors[p] for p in self._diagonal]), strict=True))
        for places, inverse in self._batches:
            own = [tensors[place] for place in places]
            made = inverse.of_parameters(own) if len(own) > 1 else [inverse.of_parameter(own[0])]
            scaled |= zip(places, made, strict=True)
        return [scaled[place] for place in range(len(tensors))]

    def _multiplied(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return torch._foreach_mul(tensors, self._numbers) if tensors else ()

    def times(self, place: int, x: Tensor) -> Tensor:
        """Return D x of a tensor x of one parameter, given by its place."""
        scale = self._scales[place]
        if isinstance(scale, CoupledScale):
            return multiplied([scale], [x])[0]
        return scale.itself().of_parameter(x) if x.numel() else x


def metric_of(scales: Sequence[Scale | None], parameters: Sequence[Tensor]) -> Metric | None:
    """Return D⁻¹ of parameters; None where D is the identity for all of them."""
    found = [scale for scale in scales if scale is not None]
    return Metric(found, parameters) if found else None


def worth_a_batch(x: Tensor) -> bool:
    """Whether parameters like this one are multiplied in one call; on a CPU it pays as long as calls cost the most."""
    return x.is_contiguous() and (x.device.type != "cpu" or x.numel() <= 2**12)


def _form(place: int, inverse: Multiplier, x: Tensor) -> tuple[object, ...]:
    """Return what parameters have in common that are multiplied in one call; one that is alone has its place."""
    alone = () if worth_a_batch(x) else (place,)
    return (x.shape, inverse.left.shape, inverse.right.shape, inverse.left.dtype, x.device, *alone)


def _joined(multipliers: Sequence[Multiplier]) -> Multiplier:
    """Return one whose groups are those of all of them."""
    if len(multipliers) == 1:
        return multipliers[0]
    left, right = zip(*multipliers, strict=True)
    return Multiplier(torch.cat(left), torch.cat(right))
