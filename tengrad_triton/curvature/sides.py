"""Symmetric matrices by their eigenvalues, which are the sides of scaled damping's D (docs/math.md, M17).

Dimensions: G groups, n entries of one side of a weight; B sides in one batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Spectrum = tuple[Tensor, Tensor | None]
"""Eigenvalues [G, n] of symmetric matrices, and their eigenvectors [G, n, n] as columns; None for diagonal matrices."""


class Side(NamedTuple):
    """Symmetric positive definite matrices, one for each group, by their `Spectrum`.

    Attributes:
        values_Gn: the eigenvalues [G, n].
        basis_Gnn: the eigenvectors [G, n, n] as columns; None for diagonal matrices.
        inverse: the inverse matrices [G, n, n], or their diagonals [G, n] if they are diagonal.
    """

    values_Gn: Tensor
    basis_Gnn: Tensor | None
    inverse: Tensor

    def matrices(self) -> Tensor:
        """Return the matrices themselves: [G, n, n], or their diagonals [G, n] if they are diagonal."""
        return self.values_Gn if self.basis_Gnn is None else _assembled(self.values_Gn, self.basis_Gnn)

    def root(self, of_inverse: bool) -> Tensor:
        """Return M with M Mᵀ the matrices themselves, or their inverses: [G, n, n], or [G, n] if they are diagonal."""
        roots_Gn = self.values_Gn.rsqrt() if of_inverse else self.values_Gn.sqrt()
        return roots_Gn if self.basis_Gnn is None else self.basis_Gnn * roots_Gn.unsqueeze(1)


def _assembled(values_Gn: Tensor, basis_Gnn: Tensor) -> Tensor:
    """Return the matrices of these eigenvalues and eigenvectors."""
    return (basis_Gnn * values_Gn.unsqueeze(-2)) @ basis_Gnn.mT


def sides_of(spectra: Sequence[Spectrum]) -> list[Side]:
    """Return the matrices of these eigenvalues and eigenvectors; those of one size take each operation together."""
    made: dict[int, Side] = {}
    for places in places_of_alike([(x.shape, basis is None, x.dtype, x.device) for x, basis in spectra]):
        own = [spectra[place] for place in places]
        inverse_BGn = torch.stack([values_Gn for values_Gn, _ in own]).reciprocal()
        bases = [basis_Gnn for _, basis_Gnn in own if basis_Gnn is not None]
        inverses = (_assembled(inverse_BGn, torch.stack(bases)) if bases else inverse_BGn).unbind()
        made |= {place: Side(*one, x) for place, one, x in zip(places, own, inverses, strict=True)}
    return [made[place] for place in range(len(spectra))]


def places_of_alike(keys: Sequence[Hashable]) -> Iterable[list[int]]:
    """Return the places at which each of the distinct keys stands."""
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    return alike.values()
