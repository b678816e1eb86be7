"""D of every parameter from its moments (docs/math.md, M17).

Dimensions: G groups, n entries of one side of a weight; B sides in one batch, T parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.moments.running import AllMoments, mean_of
from tengrad_triton.curvature.scaling import Scale, Scales, unit_of
from tengrad_triton.curvature.sides import Spectrum, places_of_alike, sides_of

FLOOR = 0.01  # what every eigenvalue gets in addition before the root, as a share of their mean
LEAST = 1e-4  # the least size of V that D takes from a parameter, as a share of that of all parameters


def scales_of(moments: AllMoments, layers: Sequence[LayerParams]) -> Scales:
    """Return D of every parameter: the root of the Kronecker product of its second moments.

    Each side has eigenvalues (λ + `FLOOR` mean λ)^½, divided by their root mean square. The root mean square of the
    eigenvalues of D is that of the entries of V, times the parameter's `unit_of`; at least `LEAST` times that of all
    parameters, because V may be zero, or rounding alone, as for a bias before a batch norm.
    """
    own = [(name, param_name, one) for name, layer in moments.items() for param_name, one in layer.items()]
    if not own:
        return {}
    parameters = {layer.name: layer.parameters for layer in layers}
    square_T = mean_of(*(torch.stack([one[at] for _, _, one in own]) for at in (2, 3)))
    least = LEAST**2 * square_T.mean()
    size_T = torch.where(least > 0, square_T.maximum(least), torch.ones_like(square_T)).sqrt()
    units = [unit_of(parameters[name][param_name]) for name, param_name, _ in own]
    sizes = [*torch._foreach_mul(list(size_T.unbind()), units), *[torch.ones_like(size_T[0])] * len(own)]
    sides = sides_of(_roots([*(one.rows for _, _, one in own), *(one.columns for _, _, one in own)], sizes))
    scales: dict[str, dict[str, Scale]] = {}
    for (name, param_name, _), rows, columns in zip(own, sides[: len(own)], sides[len(own) :], strict=True):
        scales.setdefault(name, {})[param_name] = Scale(rows, columns)
    return scales


def _roots(moments: Sequence[Tensor], sizes: Sequence[Tensor]) -> list[Spectrum]:
    """Return the roots of second moments with the floor, with these root mean squares; ones where they are zero.

    In float32 the eigenvalue solver may not converge, where many eigenvalues are alike.
    """
    made: dict[int, Spectrum] = {}
    for places in places_of_alike([(x.shape, x.dtype, x.device) for x in moments]):
        values_BGn, bases = torch.stack([moments[place] for place in places]), [None] * len(places)
        if values_BGn.dim() == 4:
            values_BGn, basis_BGnn = (x.to(values_BGn.dtype) for x in torch.linalg.eigh(values_BGn.double()))
            bases = basis_BGnn.unbind()
        size_B = torch.stack([sizes[place] for place in places]).to(values_BGn.dtype)
        made |= zip(places, zip(_floored(values_BGn, size_B).unbind(), bases, strict=True), strict=True)
    return [made[place] for place in range(len(moments))]


def _floored(values_BGn: Tensor, size_B: Tensor) -> Tensor:
    """Return the roots of eigenvalues with the floor, with these root mean squares."""
    values_BGn = values_BGn.clamp(min=0.0)
    mean_B = values_BGn.mean((1, 2), keepdim=True)
    roots_BGn = (values_BGn + FLOOR * mean_B).sqrt()
    roots_BGn = torch.where(mean_B > 0, roots_BGn, torch.ones_like(roots_BGn))
    return roots_BGn * (size_B[:, None, None] / roots_BGn.square().mean((1, 2), keepdim=True).sqrt())
