"""A physics-informed network: Poisson's equation, in float64.

Key: N samples, S points of a stencil.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import Batch, Problem, Regression

STENCIL = torch.tensor([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)


class Poisson(nn.Module):
    """The residual of −Δu = f on the unit square, u = 0 on its border, where u is a network times x(1−x)y(1−y).

    Δ is the five-point stencil of width h: in float64 its error, h² u'''' / 12, is far below that of the network.
    """

    def __init__(self, width: int, h: float = 1e-3) -> None:
        super().__init__()
        layers = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        self.network = nn.Sequential(*layers).double()
        self.h = h

    def solution(self, x_NS2: Tensor) -> Tensor:
        """Return u at points of the square."""
        border = (x_NS2 * (1 - x_NS2)).prod(-1)
        return 16 * border * self.network(2 * x_NS2 - 1).squeeze(-1)

    def forward(self, x_N2: Tensor) -> Tensor:
        """Return −Δu at points of the square."""
        u_NS = self.solution(x_N2[:, None] + self.h * STENCIL)
        return (4 * u_NS[:, 0] - u_NS[:, 1:].sum(1)) / self.h**2


def exact_solution(x_N2: Tensor) -> Tensor:
    """Return u = sin(πx) sin(πy) + sin(3πx) sin(2πy) / 4."""
    waves = [((1, 1), 1.0), ((3, 2), 0.25)]
    return sum((c * torch.sin(math.pi * x_N2 * torch.tensor(k)).prod(1) for k, c in waves), torch.zeros(()))


def source_term(x_N2: Tensor) -> Tensor:
    """Return f = −Δu."""
    waves = [((1, 1), 2.0), ((3, 2), 13 / 4)]
    factor = math.pi**2
    return sum((factor * c * torch.sin(math.pi * x_N2 * torch.tensor(k)).prod(1) for k, c in waves), torch.zeros(()))


@dataclass(frozen=True)
class Equation(Regression):
    """The mean square of the residual of Poisson's equation at random points, new ones for every batch."""

    batch: int = 256

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield points of the square, and f at these points."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            x_N2 = torch.rand(self.batch, 2, dtype=torch.float64, generator=generator)
            yield x_N2, source_term(x_N2)

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield the midpoints of a 32 × 32 grid, and f at these points."""
        middle = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
        x_N2 = torch.cartesian_prod(middle, middle)
        yield x_N2, source_term(x_N2)

    @override
    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss, and the relative L2 error of u, on the test points."""
        assert isinstance(model, Poisson)
        ((x_N2, f_N),) = self.test_batches()
        u_N = exact_solution(x_N2)
        error = (model.solution(x_N2) - u_N).norm() / u_N.norm()
        return {"loss": F.mse_loss(model(x_N2), f_N).item(), "quality": error.item()}


PROBLEM = Problem(
    "PINN, Poisson's equation in float64",
    "choose",
    build=lambda: Poisson(32),
    task=lambda data: Equation(),
    steps=800,
    likelihood="gaussian",
    quality="error",
)
