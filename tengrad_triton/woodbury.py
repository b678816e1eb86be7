"""The natural gradient by the Woodbury identity: factor once a refresh, solve every step.

Dimensions: L blocks, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.jacobian import Jacobian
from tengrad_triton.kernels import update_
from tengrad_triton.update import Target

BlockJacobian = Mapping[str, Jacobian]
"""A block's J, side by side: the parameters' names within their layer, and the rows of each."""


@dataclass(frozen=True)
class Curvature:
    """What one refresh leaves behind for the steps until the next: every block's J and its factored N×N system.

    Attributes:
        blocks: J of every block, by the block's name.
        inverse_LNN: W = C⁻¹ with C Cᵀ = K + N α I, so that (K + N α I)⁻¹ = Wᵀ W.
        divisor_L: the damping α that was factored with K; only this one makes the identity hold.
        failures_L: how many factorizations of each block have failed so far.
    """

    blocks: Mapping[str, BlockJacobian]
    inverse_LNN: Tensor
    divisor_L: Tensor
    failures_L: Tensor

    @property
    def is_spent(self) -> bool:
        """Whether J is gone: only what the next refresh reads, the failures, is left."""
        return any(not rows for rows in self.blocks.values())

    def spent(self) -> Curvature:
        """Return what is left when no step will use J any more, so that its memory serves the refresh to come."""
        nothing = self.inverse_LNN.new_empty(0, 0, 0)
        return Curvature({name: {} for name in self.blocks}, nothing, self.divisor_L, self.failures_L)

    def step_(self, targets: Sequence[Target], ops: Any) -> None:
        """Update every target along its block's natural gradient, or along its gradient where the block has no J.

        The natural gradient is (F + α I)⁻¹ V = (V − Jᵀ w) / α with w = (K + N α I)⁻¹ J V (paper, equation 4). All that
        can fail comes before the first update.
        """
        solved, divisors = self._solve(targets, ops), self.divisors()
        for target in targets:
            rows = self.blocks.get(target.block, {}).get(target.label)
            if rows is None:
                update_(target.parameter, target.momentum, target.grad, target.settings, target.nesterov)
            else:
                rows.expand_update_(target, solved[target.block], divisors[target.block])

    def _solve(self, targets: Sequence[Target], ops: Any) -> dict[str, Tensor]:
        """Return w_N = (K + N α I)⁻¹ J V for every block."""
        if not self.blocks:
            return {}
        samples = self.inverse_LNN.shape[-1]
        y_N = {name: self.inverse_LNN.new_zeros(samples) for name in self.blocks}
        for target in targets:
            rows = self.blocks.get(target.block, {}).get(target.label)
            if rows is not None:
                projected = rows.project(target.grad)
                y_N[target.block] = y_N[target.block] + F.pad(projected, (0, samples - len(projected)))
        w_LN = ops.cholesky_solve(self.inverse_LNN, torch.stack(list(y_N.values())))
        return dict(zip(self.blocks, w_LN.unbind(), strict=True))

    def divisors(self) -> dict[str, Tensor]:
        """Return what each block's direction is divided by."""
        return dict(zip(self.blocks, self.divisor_L.unbind(), strict=True))


def curvature(
    blocks: Mapping[str, BlockJacobian],
    damping_L: Tensor,
    failures_L: Tensor,
    ops: Any,
    tol: Mapping[str, float] | None = None,
) -> Curvature:
    """Factor K + N α I for every block, in one batch; ``failures_L`` counts the failures of each block so far.

    Where the factorization fails because rounding made K indefinite, that block takes the gradient over its largest
    possible curvature until the next refresh: w = 0 and the divisor α + trace(K) / N ≥ α + λ_max(F). Each failure
    raises the block's damping tenfold from the next refresh on.

    The blocks named in ``tol`` are compressed to that tolerance: their rank, and nothing else, is read back from the
    device.
    """
    if not blocks:
        return Curvature(blocks, damping_L.new_empty(0, 0, 0), damping_L, failures_L)
    k_LNN = torch.stack([_gram(block) for block in blocks.values()])
    samples, failures_L = k_LNN.shape[-1], failures_L.to(k_LNN)
    damping_L = damping_L.to(k_LNN) * 10.0**failures_L
    factor_LNN, pivot_L = ops.cholesky(k_LNN, samples * damping_L)
    healthy_L = pivot_L > 0  # false for NaN too
    inverse_LNN = torch.where(healthy_L[:, None, None], ops.cholesky_inverse(factor_LNN), 0.0)
    bound_L = damping_L + k_LNN.diagonal(dim1=1, dim2=2).sum(1) / samples
    factored = Curvature(blocks, inverse_LNN, torch.where(healthy_L, damping_L, bound_L), failures_L + ~healthy_L)
    return compress(factored, k_LNN, samples * damping_L, tol) if tol else factored


def failures_of(names: Sequence[str], before: Curvature | None) -> Tensor:
    """Return how many factorizations of the blocks named have failed before, on the device that knows."""
    counts = {} if before is None else dict(zip(before.blocks, before.failures_L.unbind(), strict=True))
    none = next((count.new_zeros(()) for count in counts.values()), torch.zeros(()))
    return torch.stack([counts.get(name, none) for name in names]) if names else torch.empty(0)


def compress(full: Curvature, k_LNN: Tensor, shift_L: Tensor, tol: Mapping[str, float]) -> Curvature:
    """Keep of each block named in ``tol`` the directions whose share of the correction is at least that tolerance.

    With K = Q Λ Qᵀ and v_i = Jᵀ q_i / √λ_i the natural gradient is (V − Σ_i f_i v_i ⟨v_i, V⟩) / α with
    f_i = λ_i / (λ_i + N α). Dropping every i with f_i < tol changes it by at most tol ‖V‖ / α (docs/math.md, M7).
    """
    blocks, inverses = dict(full.blocks), list(full.inverse_LNN.unbind())
    for row, name in enumerate(full.blocks):
        if name in tol:
            eigenvalues_N, q_NN = torch.linalg.eigh(k_LNN[row])
            share_N = eigenvalues_N / (eigenvalues_N + shift_L[row])
            kept = share_N >= tol[name]
            directions_RN = (q_NN[:, kept] / eigenvalues_N[kept].sqrt()).mT
            blocks[name] = {label: rows.combined(directions_RN) for label, rows in full.blocks[name].items()}
            root_R = share_N[kept].sqrt()
            inverses[row] = torch.diag(F.pad(root_R, (0, len(share_N) - len(root_R))))
    return Curvature(blocks, torch.stack(inverses), full.divisor_L, full.failures_L)


def _gram(block: BlockJacobian) -> Tensor:
    """Return the Gram matrix of a block: its parameters lie side by side in J, so theirs add up."""
    return torch.stack([rows.gram() for rows in block.values()]).sum(0)
