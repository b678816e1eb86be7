"""The natural gradient by the Woodbury identity: factor once a refresh, solve every step.

Dimensions: L blocks, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.jacobian import Jacobian

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

    def solve(self, grads: Mapping[str, Mapping[str, Tensor]], ops: Any) -> dict[str, Tensor]:
        """Return w_N = (K + N α I)⁻¹ J V for every block with gradients V; (V − Jᵀ w) / α is then its natural gradient.

        That is (F + α I)⁻¹ V with F = Jᵀ J / N (paper, equation 4).
        """
        if not self.blocks:
            return {}
        y_LN = torch.zeros_like(self.inverse_LNN[:, 0])
        for row, (name, block) in enumerate(self.blocks.items()):
            for label in block.keys() & grads[name].keys():
                y_LN[row] += block[label].project(grads[name][label], ops)
        return dict(zip(self.blocks, ops.cholesky_solve(self.inverse_LNN, y_LN).unbind(), strict=True))

    def divisors(self) -> dict[str, Tensor]:
        """Return what each block's direction is divided by."""
        return dict(zip(self.blocks, self.divisor_L.unbind(), strict=True))

    def failures(self) -> dict[str, Tensor]:
        """Return how many factorizations of each block have failed."""
        return dict(zip(self.blocks, self.failures_L.unbind(), strict=True))


def curvature(
    blocks: Mapping[str, BlockJacobian], dampings: Mapping[str, float], failures: Mapping[str, Tensor], ops: Any
) -> Curvature:
    """Factor K + N α I for every block, in one batch; ``failures`` are those of each block so far.

    Where the factorization fails because rounding made K indefinite, that block takes the gradient over its largest
    possible curvature until the next refresh: w = 0 and the divisor α + trace(K) / N ≥ α + λ_max(F). Each failure
    raises the block's damping tenfold from the next refresh on. No value is read back from the device.
    """
    if not blocks:
        return Curvature(blocks, *(torch.empty(shape) for shape in ((0, 0, 0), (0,), (0,))))
    k_LNN = torch.stack([_gram(block, ops) for block in blocks.values()])
    samples, zero = k_LNN.shape[-1], k_LNN.new_zeros(())
    failures_L = torch.stack([failures.get(name, zero) for name in blocks])
    damping_L = k_LNN.new_tensor([dampings[name] for name in blocks]) * 10.0**failures_L
    factor_LNN, pivot_L = ops.cholesky(k_LNN, samples * damping_L)
    healthy_L = pivot_L > 0  # false for NaN too
    inverse_LNN = torch.where(healthy_L[:, None, None], ops.cholesky_inverse(factor_LNN), 0.0)
    bound_L = damping_L + k_LNN.diagonal(dim1=1, dim2=2).sum(1) / samples
    return Curvature(blocks, inverse_LNN, torch.where(healthy_L, damping_L, bound_L), failures_L + ~healthy_L)


def _gram(block: BlockJacobian, ops: Any) -> Tensor:
    """Return the Gram matrix of a block: its parameters lie side by side in J, so theirs add up."""
    return torch.stack([rows.gram(ops) for rows in block.values()]).sum(0)
