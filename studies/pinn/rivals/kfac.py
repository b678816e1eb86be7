"""KFAC and KFAC* for physics-informed networks.

Dangel, Müller and Zeinhofer, 2024 (arXiv 2405.15603), in the expand form. The Gramian block of a layer's [W, b] is
taken as B₁ ⊗ A₁ + B₂ ⊗ A₂, one product for the equation and one for all terms that are values of u. Over the N points
and C channels of the forward Laplacian, A = Σ a aᵀ / (N C) for layer inputs a (1 appended in the value channel, 0 in
all others) and B = Σ w g gᵀ / N for the derivatives g of the point's L u by the layer's outputs.

KFAC takes −(B₁ ⊗ A₁ + B₂ ⊗ A₂)⁻¹ of the gradient, momentum, and the grid search; KFAC* takes the step size and the
momentum that minimize the quadratic model with the exact Gramian (Martens and Grosse, 2015, section 7).

Key: P parameters, C channels, N points, I inputs, O outputs, J = I + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from studies.pinn.rivals.descent import Rival, move
from studies.pinn.rivals.rows import FactoredRows, Rows
from studies.pinn.rivals.squares import LeastSquares, LinearSquares
from studies.pinn.rivals.taylor import LayerTape

FIRST_RATE = 1e-6
"The step size of KFAC*'s first step, which has no earlier update to look at."


class Kfac(Rival):
    """KFAC with momentum and the grid search, or KFAC*.

    Args:
        squares: the problem and its network: a chain of Linear and Tanh, and an equation linear in u.
        damping: λ, added to each of the four factors.
        average: β, the weight of the factors of earlier steps.
        identity: whether the factors start as identities instead of zeros.
        momentum: of the direction. KFAC* finds its own.
        automatic: whether this is KFAC*.
        lr: a fixed step size, or None for the grid search.

    Raises:
        ValueError: if the rows have no layer inputs and output gradients, or one of the two products has no terms.
    """

    def __init__(
        self,
        squares: LeastSquares,
        damping: float,
        average: float = 0.95,
        identity: bool = True,
        momentum: float = 0.0,
        automatic: bool = False,
        lr: float | None = None,
    ) -> None:
        super().__init__(squares, lr)
        if not isinstance(squares, LinearSquares):
            raise ValueError("KFAC needs a network of Linear and Tanh, and an equation that is linear in u")
        self.values = [operator.only_value for operator in squares.operators.values()]
        if len(set(self.values)) != 2:
            raise ValueError("KFAC needs a term with derivatives of u, and one without")
        self.damping, self.average, self.momentum, self.automatic = damping, average, momentum, automatic
        self.buffer_P: Tensor | None = None
        self.factors: list[list[tuple[Tensor, Tensor]]] = []
        for layer in squares.layers:
            shape = (layer.in_features + 1, layer.out_features)
            start = [torch.eye(n).to(layer.weight) if identity else layer.weight.new_zeros(n, n) for n in shape]
            self.factors.append([(start[0].clone(), start[1].clone()) for _ in range(2)])

    @override
    @torch.no_grad()
    def direction(self, points: Mapping[str, Any]) -> tuple[Tensor, float]:
        rows = self.squares.rows(points)
        direction_P = self._preconditioned(rows)
        if self.momentum and self.buffer_P is not None:
            direction_P.add_(self.buffer_P, alpha=self.momentum)
        self.buffer_P = direction_P
        return direction_P, rows.residual_N.square().sum().item()

    @override
    @torch.no_grad()
    def step(self, points: Mapping[str, Any]) -> None:
        """Move the parameters once."""
        if not self.automatic:
            super().step(points)
            return
        rows = self.squares.rows(points)
        direction_P = self._preconditioned(rows)
        if self.buffer_P is None:
            update_P = FIRST_RATE * direction_P
        else:
            rate, momentum = best_of_two(rows, direction_P, self.buffer_P, self.damping)
            update_P = rate * direction_P + momentum * self.buffer_P
        self.buffer_P = update_P
        move(self.squares, update_P, 1.0)
        self.steps += 1

    def _preconditioned(self, rows: Rows) -> Tensor:
        """Average the factors of this step in, and return minus the preconditioned gradient, ``[P]``."""
        assert isinstance(rows, FactoredRows)
        gradient_P = rows.transposed(rows.residual_N)
        parts = []
        for layer, pairs in enumerate(self.factors):
            for pair, wanted in zip(pairs, (False, True), strict=True):
                tapes = [
                    t[layer] for t, only_values in zip(rows.tapes, self.values, strict=True) if only_values == wanted
                ]
                for kept, new in zip(pair, kronecker_factors(tapes), strict=True):
                    kept.lerp_(new, 1 - self.average)
            outputs, inputs = len(pairs[0][1]), len(pairs[0][0])
            weight_Q, bias_O, gradient_P = gradient_P.split(
                [outputs * (inputs - 1), outputs, len(gradient_P) - outputs * inputs]
            )
            gradient_OJ = torch.cat([weight_Q.view(outputs, inputs - 1), bias_O[:, None]], 1)
            solved_OJ = solve_kronecker_sum(pairs[0], pairs[1], self.damping, gradient_OJ)
            parts += [-solved_OJ[:, :-1].flatten(), -solved_OJ[:, -1]]
        return torch.cat(parts)


def kronecker_factors(tapes: list[LayerTape]) -> tuple[Tensor, Tensor]:
    """Return A ``[J, J]`` and B ``[O, O]`` of one layer from the tapes of some terms, which carry √(w / N)."""
    input_QI = torch.cat([tape.input_CNI.flatten(0, 1) for tape in tapes])
    grad_QO = torch.cat([tape.grad_CNO.flatten(0, 1) for tape in tapes])
    ones_Q = torch.cat([_value_channel(tape) for tape in tapes])
    input_QJ = torch.cat([input_QI, ones_Q[:, None]], 1)
    return input_QJ.T @ input_QJ / len(input_QJ), grad_QO.T @ grad_QO


def _value_channel(tape: LayerTape) -> Tensor:
    """Return 1 for the points of the value channel and 0 for those of all others, ``[C N]``."""
    mark_CN = torch.zeros_like(tape.input_CNI[..., 0])
    mark_CN[0] = 1.0
    return mark_CN.flatten()


def solve_kronecker_sum(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], damping: float, gradient_OJ: Tensor
) -> Tensor:
    """Return (B₁ ⊗ A₁ + B₂ ⊗ A₂)⁻¹ of a gradient, ``[O, J]``, with λ I added to each factor.

    With K so that Kᵀ B₁ K = I and Kᵀ B₂ K = diag(s), and H and t likewise for A₁ and A₂, it is
    K ((Kᵀ X H) / (1 + s tᵀ)) Hᵀ (Martens and Grosse, 2015, appendix B).
    """
    basis_JJ, values_J = _joint_basis(first[0], second[0], damping)
    basis_OO, values_O = _joint_basis(first[1], second[1], damping)
    inner_OJ = (basis_OO.T @ gradient_OJ @ basis_JJ) / (1 + values_O[:, None] * values_J)
    return basis_OO @ inner_OJ @ basis_JJ.T


def _joint_basis(one_QQ: Tensor, other_QQ: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return K with Kᵀ (M + λ I) K = I and Kᵀ (M' + λ I) K diagonal, and that diagonal."""
    values_Q, vectors_QQ = torch.linalg.eigh(one_QQ)
    # eigenvalues of a sum of outer products are not negative: rounding alone makes them so
    scaled_QQ = vectors_QQ / (values_Q.clamp(min=0.0) + damping).sqrt()
    damped_QQ = other_QQ.clone()
    damped_QQ.diagonal().add_(damping)
    joint_Q, rotation_QQ = torch.linalg.eigh(scaled_QQ.T @ damped_QQ @ scaled_QQ)
    return scaled_QQ @ rotation_QQ, joint_Q


def best_of_two(rows: Rows, direction_P: Tensor, previous_P: Tensor, damping: float) -> tuple[float, float]:
    """Return the factors of a direction and of the previous update that minimize ½ ‖J s + r‖² + ½ λ ‖s‖²."""
    both_P2 = torch.stack([direction_P, previous_P], 1)
    images_N2 = torch.stack([rows.times(direction_P), rows.times(previous_P)], 1)
    model_22 = images_N2.T @ images_N2 + damping * both_P2.T @ both_P2
    rate, momentum = torch.linalg.solve(model_22, -images_N2.T @ rows.residual_N).tolist()
    return rate, momentum
