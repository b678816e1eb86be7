"""What a residual is made of: a linear operator on u, which the rows of tanh networks are computed for.

Key: N points, D coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

from studies.pinn.problems.base import Problem


@dataclass(frozen=True)
class Operator:
    """The operator L u = value · u + Σ_d first_d ∂u/∂x_d + second Σ_{d in coordinates} ∂²u/∂x_d².

    A residual is L u plus what the points alone decide.

    Attributes:
        value: the factor of u.
        first: factors of the first derivatives, by coordinate.
        second: the factor of the sum of second derivatives.
        coordinates: whose second derivatives are added; all where it is None.
    """

    value: float = 0.0
    first: tuple[tuple[int, float], ...] = ()
    second: float = 0.0
    coordinates: tuple[int, ...] | None = None

    @property
    def only_value(self) -> bool:
        """Whether L u is a multiple of u, so that no derivative is needed."""
        return not self.first and not self.second

    def summed(self, inputs: int) -> list[int]:
        """Return the coordinates whose second derivatives are added, of so many inputs."""
        return list(range(inputs)) if self.coordinates is None else list(self.coordinates)


VALUE = Operator(value=1.0)
LAPLACIAN = Operator(second=1.0)


def heat(inputs: int) -> Operator:
    """Return ∂u/∂t − Δu / 4, where t is the first of so many inputs."""
    return Operator(first=((0, 1.0),), second=-0.25, coordinates=tuple(range(1, inputs)))


def operators_of(problem: Problem, names: list[str], inputs: int) -> dict[str, Operator] | None:
    """Return the operator of each term, or None where one is not linear with constant factors.

    Args:
        problem: Poisson's or the heat equation by its name; its term ``interior`` is the equation, and all others are
            values of u.
        names: the names of its terms.
        inputs: the number of inputs of the network.
    """
    if problem.name.startswith("poisson"):
        interior = LAPLACIAN
    elif problem.name.startswith("heat"):
        interior = heat(inputs)
    else:
        return None
    return {name: interior if name == "interior" else VALUE for name in names}
