"""EKFAC: the eigenbasis of K-FAC's factors, and the gradients' second moments in it (docs/math.md, M15).

Dimensions: N samples, G groups, P positions, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.batch_factors import chunks
from tengrad_triton.baselines.fisher_factors import BothSides, FisherFactorOptimizer
from tengrad_triton.baselines.kronecker import KroneckerLayer, LayerBatch
from tengrad_triton.baselines.kronecker_curvature import KroneckerCurvature
from tengrad_triton.baselines.linalg import by_size, eigenbasis
from tengrad_triton.baselines.settings import FactorSettings, document
from tengrad_triton.optim.validation import check_count
from tengrad_triton.profiling import phase


@dataclass(frozen=True)
class EkfacState:
    """The running factors of a layer, their eigenvectors, and the second moments in that basis.

    Attributes:
        a_GII: the running A.
        g_GOO: the running Γ.
        basis_a_GII: U_A, the eigenvectors of A as columns.
        basis_g_GOO: U_Γ, the eigenvectors of Γ as columns.
        scale_GOI: S, the second moments.
        damping: α, as a 0-dim tensor.
    """

    a_GII: Tensor
    g_GOO: Tensor
    basis_a_GII: Tensor
    basis_g_GOO: Tensor
    scale_GOI: Tensor
    damping: Tensor

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return U_Γ ((U_Γᵀ V U_A) / (S + α)) U_Aᵀ."""
        rotated_GOI = self.basis_g_GOO.mT @ v_GOI @ self.basis_a_GII
        return self.basis_g_GOO @ rotated_GOI.div_(self.scale_GOI + self.damping) @ self.basis_a_GII.mT

    def squared_norm(self, v_GOI: Tensor) -> Tensor:
        """Return vᵀ F v with the damped F that `solve` inverts."""
        rotated_GOI = self.basis_g_GOO.mT @ v_GOI @ self.basis_a_GII
        return (rotated_GOI.square() * (self.scale_GOI + self.damping)).sum()

    @property
    def representation(self) -> str:
        """Return a description of the state, for the summary."""
        return f"eigenbasis {self.g_GOO.shape[1]} x {self.a_GII.shape[1]}"


@document
class EKFAC(FisherFactorOptimizer[EkfacState]):
    """Eigenvalue-corrected K-FAC (George, Laurent, Bouthillier, Ballas, Vincent 2018).

    F ≈ U diag(S) Uᵀ for every layer, where the columns of U are the eigenvectors of K-FAC's A ⊗ Γ, and S is
    E[(U_Γᵀ J_n U_A)²]. No other diagonal matrix in that basis is nearer to F (docs/math.md, M15):

        d = U_Γ ((U_Γᵀ ∇L U_A) / (S + α)) U_Aᵀ + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    Args:
        {model}
        damping: α > 0, or a function of the step; 0.03 by default. It is read when the second moments are measured.
        {common}
        refresh_every: steps from one eigendecomposition of the factors to the next, or a function of the step; 100 by
            default.
        rescale_every: steps from one measurement of the second moments to the next; 20 by default. In one basis they
            are running means with the decay ``stat_decay``; a new basis begins with new ones.
        {factors}
    """

    state_key = "ekfac"
    kernels = "eigh"

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        rescale_every: int = 20,
        **settings: Unpack[FactorSettings],
    ) -> None:
        check_count("rescale_every", rescale_every)
        self._rescale_every = rescale_every
        super().__init__(model, params, lr, **settings)

    @override
    def _refresh_is_due(self) -> bool:
        return self._inversion_is_due() or self._rescaling_is_due() or self._factors_are_due()

    def _rescaling_is_due(self) -> bool:
        """Whether the next step measures the second moments."""
        return self._age % self._rescale_every == 0

    @override
    def _refreshed(self) -> tuple[KroneckerCurvature[EkfacState], int]:
        batches = self._gather()
        with phase("curvature"):
            self._follow_schedules()
            previous = self._previous(batches)
            new_basis = self._inversion_is_due() or len(previous) < len(batches)
            factors, count = self._factors(batches, previous, new_basis)
            bases, failures = self._bases(factors, previous, new_basis)
            states = {}
            for batch in batches:
                layer, basis = batch.layer, bases[batch.layer]
                scale_GOI = self._scale(batch, basis, None if new_basis else previous[layer].scale_GOI)
                damping = scale_GOI.new_full((), self._setting_of(layer, "damping"))
                states[layer] = EkfacState(*factors[layer], *basis, scale_GOI, damping)
            return KroneckerCurvature(states, count, self._failures_with(failures)), 0 if new_basis else self._age

    def _factors(
        self, batches: Sequence[LayerBatch], previous: Mapping[KroneckerLayer, EkfacState], new_basis: bool
    ) -> tuple[BothSides, int]:
        """Return the running A and Γ, with this step's batch if that is due, and the number of their batches."""
        before = self._curvature
        if before is None or new_basis or self._factors_are_due():
            return self._running_factors(batches, previous)
        return {layer: (state.a_GII, state.g_GOO) for layer, state in previous.items()}, before.batches

    def _bases(
        self, factors: BothSides, previous: Mapping[KroneckerLayer, EkfacState], new_basis: bool
    ) -> tuple[BothSides, Tensor]:  # fmt: skip
        """Return U_A and U_Γ of each layer, and how many eigendecompositions failed."""
        if not new_basis:
            kept = {layer: (state.basis_a_GII, state.basis_g_GOO) for layer, state in previous.items()}
            return kept, torch.zeros((), dtype=torch.long, device=self._generator.device)
        found, failures = by_size(eigenbasis, [factor for pair in factors.values() for factor in pair])
        return dict(zip(factors, zip(found[::2], found[1::2], strict=True), strict=True)), failures

    def _scale(self, batch: LayerBatch, basis: tuple[Tensor, Tensor], past_GOI: Tensor | None) -> Tensor:
        """Return S: this batch's second moments in a new basis, a running mean with ``past_GOI`` in an old one."""
        if past_GOI is not None and not self._rescaling_is_due():
            return past_GOI
        own_GOI = second_moments(batch, *basis)
        return own_GOI if past_GOI is None else past_GOI.lerp(own_GOI, 1 - self._stat_decay)

    @override
    def _state_of(self, tensors: dict[str, Any]) -> EkfacState:
        return EkfacState(**tensors)


def second_moments(batch: LayerBatch, basis_a_GII: Tensor, basis_g_GOO: Tensor) -> Tensor:
    """Return s_GOI = Σ_n (U_Γᵀ J_n U_A)² / N, squared entry by entry, where J_n belongs to weight and bias together.

    Source: George et al. 2018.
    """
    samples, total_GOI = 0, torch.zeros(())
    single = all(call.g_NGPO.shape[2] == 1 for call in batch.calls)
    entries = basis_a_GII.shape[0] * basis_a_GII.shape[1] * basis_g_GOO.shape[1]
    for a_NGPI, g_NGPO in chunks(batch, 0 if single else entries):
        inputs = a_NGPI.shape[3]
        a_GNPI = a_NGPI.transpose(0, 1) @ basis_a_GII[:, None, :inputs]
        if batch.layer.bias is not None:
            a_GNPI += basis_a_GII[:, None, inputs:]  # the term of the constant input 1
        g_GNPO = g_NGPO.transpose(0, 1) @ basis_g_GOO[:, None]
        if a_GNPI.shape[2] == 1:  # the square of one outer product is the outer product of the squares
            own_GOI = g_GNPO[:, :, 0].square().mT @ a_GNPI[:, :, 0].square()
        else:
            own_GOI = (g_GNPO.mT @ a_GNPI).square_().sum(1)
        total_GOI = total_GOI.add_(own_GOI) if samples else own_GOI
        samples += len(a_NGPI)
    return total_GOI / samples
