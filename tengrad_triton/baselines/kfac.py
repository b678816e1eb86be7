"""K-FAC: a layer's Fisher block as the Kronecker product of two small factors (docs/math.md, M15).

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.baselines.fisher_factors import FisherFactorOptimizer
from tengrad_triton.baselines.kronecker_curvature import KroneckerCurvature
from tengrad_triton.baselines.linalg import add_to_diagonal, by_size, inverse
from tengrad_triton.baselines.settings import document
from tengrad_triton.profiling import phase


@dataclass(frozen=True)
class KfacState:
    """The running factors of a layer, and the damped inverses that its steps use.

    Attributes:
        a_GII: the running A.
        g_GOO: the running Γ.
        inverse_a_GII: (A + π √α I)⁻¹, computed at the last inversion.
        inverse_g_GOO: (Γ + √α / π I)⁻¹, computed at the last inversion.
    """

    a_GII: Tensor
    g_GOO: Tensor
    inverse_a_GII: Tensor
    inverse_g_GOO: Tensor

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return (Γ + √α / π I)⁻¹ V (A + π √α I)⁻¹."""
        return self.inverse_g_GOO @ v_GOI @ self.inverse_a_GII

    def squared_norm(self, v_GOI: Tensor) -> Tensor:
        """Return vᵀ F v with the damped F that `solve` inverts."""
        left_GOI = torch.linalg.solve(self.inverse_g_GOO, v_GOI)
        return (torch.linalg.solve(self.inverse_a_GII, left_GOI, left=False) * v_GOI).sum()

    @property
    def representation(self) -> str:
        """Return a description of the state, for the summary."""
        return f"factors {self.g_GOO.shape[1]} x {self.a_GII.shape[1]}"


@document
class KFAC(FisherFactorOptimizer[KfacState]):
    """Kronecker-factored approximate curvature (Martens and Grosse 2015; convolutions: Grosse and Martens 2016).

    F ≈ A ⊗ Γ for every layer, weight and bias together. A and Γ are running means over batches, of mean_n Σ_p a aᵀ and
    of mean_np g gᵀ (docs/math.md, M15):

        d = (Γ + √α / π I)⁻¹ ∇L (A + π √α I)⁻¹ + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    Args:
        {model}
        damping: α > 0, or a function of the step; 0.03 by default. It is divided between the two factors
            by π² = (tr A / I) / (tr Γ / O), and read when they are inverted.
        {common}
        refresh_every: steps from one inversion of the factors to the next, or a function of the step; 100 by default.
        {factors}
    """

    state_key = "kfac"
    kernels = "cholesky_ex, cholesky_inverse"

    @override
    def _refresh_is_due(self) -> bool:
        return self._inversion_is_due() or self._factors_are_due()

    @override
    def _refreshed(self) -> tuple[KroneckerCurvature[KfacState], int]:
        batches, before = self._gather(), self._curvature
        with phase("curvature"):
            previous = self._previous(batches)
            running, count = self._running_factors(batches, previous)
            if before is not None and not self._inversion_is_due():
                kept = {
                    layer: replace(state, a_GII=running[layer][0], g_GOO=running[layer][1])
                    for layer, state in previous.items()
                }
                return KroneckerCurvature(kept, count, before.failures), self._age
            self._follow_schedules()
            pairs = [damped(*factors, self._setting_of(layer, "damping")) for layer, factors in running.items()]
            inverses, failures = by_size(inverse, [factor for pair in pairs for factor in pair])
            states = {
                layer: KfacState(*factors, *inverses[2 * index : 2 * index + 2])
                for index, (layer, factors) in enumerate(running.items())
            }
            return KroneckerCurvature(states, count, self._failures_with(failures)), 0

    @override
    def _state_of(self, tensors: dict[str, Any]) -> KfacState:
        return KfacState(**tensors)


def damped(a_GII: Tensor, g_GOO: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return A + π √α I and Γ + √α / π I with π² = (tr A / I) / (tr Γ / O).

    Source: Martens and Grosse 2015, section 6.3.
    """
    tiny = torch.finfo(a_GII.dtype).tiny
    mean_a_G, mean_g_G = (m.diagonal(dim1=1, dim2=2).mean(1).clamp(min=tiny) for m in (a_GII, g_GOO))
    pi_G = mean_a_G.sqrt() / mean_g_G.sqrt()
    return add_to_diagonal(a_GII, pi_G * damping**0.5), add_to_diagonal(g_GOO, damping**0.5 / pi_G)
