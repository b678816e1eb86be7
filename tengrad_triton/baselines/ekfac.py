"""EKFAC: K-FAC's eigenbasis, with the second moments measured in it (docs/math.md, "The rivals").

Dimensions: N samples, G groups, P positions, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.baselines.base import Curvature, Gathered, KroneckerOptimizer, Rows
from tengrad_triton.baselines.kfac import averaged, check_running
from tengrad_triton.baselines.kronecker import Layer, chunks, eigenbasis, in_batches
from tengrad_triton.curvature.refresh import BlockUses
from tengrad_triton.curvature.target import Target
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported, check_count
from tengrad_triton.profiling import phase


@dataclass(frozen=True)
class EkfacLayer:
    """The running factors, their eigenvectors as columns, the second moments in that basis, and the damping."""

    a_GII: Tensor
    g_GOO: Tensor
    basis_a_GII: Tensor
    basis_g_GOO: Tensor
    scale_GOI: Tensor
    damping: Tensor

    @property
    def running(self) -> Tensor:  # noqa: D102
        return self.a_GII

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return U_Γ ((U_Γᵀ V U_A) / (S + α)) U_Aᵀ."""
        rotated_GOI = self.basis_g_GOO.mT @ v_GOI @ self.basis_a_GII
        return self.basis_g_GOO @ rotated_GOI.div_(self.scale_GOI + self.damping) @ self.basis_a_GII.mT

    @property
    def form(self) -> str:  # noqa: D102
        return f"eigenbasis {self.g_GOO.shape[1]} x {self.a_GII.shape[1]}"


class EKFAC(KroneckerOptimizer[EkfacLayer]):
    """Eigenvalue-corrected K-FAC (George, Laurent, Bouthillier, Ballas, Vincent 2018).

    F ≈ U diag(S) Uᵀ with U the eigenvectors of K-FAC's A ⊗ Γ and S = E[(U_Γᵀ J_n U_A)²], the diagonal that is nearest
    to F in that basis;

        d = U_Γ ((U_Γᵀ ∇L U_A) / (S + α)) U_Aᵀ + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them, with settings of their own as in `TENGraD`.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: α > 0, or a function of the step; read when the second moments are measured.
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum.
        weight_decay: λ ≥ 0; added to the preconditioned gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        maximize: ascend.
        refresh_every: steps from one eigendecomposition of the factors to the next, or a function of the step.
        rescale_every: steps from one measurement of the second moments to the next.
        factors_every: steps from one batch that the running factors see to the next; as ``refresh_every`` if None.
        stat_decay: the most that the running factors, and the second moments in one basis, keep of their past.
        kl_clip: κ: the preconditioned gradient is shortened where Σ lr² ⟨d, ∇L⟩ is beyond it. None for no bound.
        fisher: ``"sampled"``, ``"exact"`` or ``"empirical"``, as in `TENGraD`.
        likelihood: as in `TENGraD`.
        fisher_samples: labels drawn for each sample.
        unsupported: what parameters get that have no factors, as in `KFAC`.
        seed: of the generator that draws labels; torch's initial seed by default.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    key = "ekfac"

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        damping: float | Schedule = 0.03,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        refresh_every: int | Callable[[int], int] = 100,
        rescale_every: int = 20,
        factors_every: int | None = None,
        stat_decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        fisher: Fisher = "sampled",
        likelihood: str | Likelihood = "categorical",
        fisher_samples: int = 1,
        unsupported: Unsupported = "sgd",
        seed: int | None = None,
    ) -> None:
        check_running(factors_every, stat_decay, kl_clip)
        check_count("rescale_every", rescale_every)
        check_count("fisher_samples", fisher_samples)
        self._rescale_every, self._factors_every = rescale_every, factors_every
        self._stat_decay, self._kl_clip = stat_decay, kl_clip
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        rows = Rows(fisher, likelihood, fisher_samples)
        super().__init__(
            model, params, defaults, rows=rows, refresh_every=refresh_every, unsupported=unsupported, seed=seed
        )

    def _why_closure(self) -> str | None:
        return None

    def _refresh_is_due(self) -> bool:
        return self._basis_is_due() or self._rescaling_is_due() or self._factors_are_due()

    def _basis_is_due(self) -> bool:
        return self._curvature is None or self._age >= self._interval()

    def _rescaling_is_due(self) -> bool:
        return self._age % self._rescale_every == 0

    def _factors_are_due(self) -> bool:
        return self._factors_every is not None and self._steps % self._factors_every == 0

    def _taken(
        self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[Curvature[EkfacLayer], int]:
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            curvature, age = self._refreshed()
        self._move(curvature, targets, self._kl_clip)
        return curvature, age

    def _refreshed(self) -> tuple[Curvature[EkfacLayer], int]:
        uses, layers = self._gathered()
        before = self._curvature
        with phase("curvature"):
            self._follow_schedules()
            past = self._past(layers)
            updates, running = self._averages(uses, layers, past, 0 if before is None else before.updates)
            due = self._basis_is_due() or any(layer.name not in past for layer in layers)
            if due:
                bases, failures = in_batches([factor for pair in running.values() for factor in pair], eigenbasis)
            else:
                bases = [b for layer in layers for b in (past[layer.name].basis_a_GII, past[layer.name].basis_g_GOO)]
                failures = torch.zeros((), dtype=torch.long, device=self._generator.device)
            states = {}
            for index, layer in enumerate(layers):
                pair = (bases[2 * index], bases[2 * index + 1])
                scale = self._scale(layer, uses[layer.block], pair, None if due else past[layer.name].scale_GOI)
                damping = torch.full((), self._damping_of(layer), dtype=scale.dtype, device=scale.device)
                states[layer.name] = (layer, EkfacLayer(*running[layer.name], *pair, scale, damping))
            earlier = 0 if before is None else before.failures
            return Curvature(states, updates, failures + earlier), 0 if due else self._age

    def _averages(
        self, uses: Gathered, layers: Sequence[Layer], past: Mapping[str, EkfacLayer], updates: int
    ) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
        """Return how many batches the running factors have seen, and those of every layer."""
        if not (self._basis_is_due() or self._factors_are_due()) and all(layer.name in past for layer in layers):
            return updates, {layer.name: (past[layer.name].a_GII, past[layer.name].g_GOO) for layer in layers}
        weight = 1 - min(1 - 1 / (updates + 1), self._stat_decay)
        return updates + 1, {layer.name: averaged(layer, uses, past.get(layer.name), weight) for layer in layers}

    def _scale(
        self, layer: Layer, block: BlockUses, bases: tuple[Tensor, Tensor], past_GOI: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Return the second moments: the batch's own where the basis is new, and a running mean in one basis."""
        if past_GOI is not None and not self._rescaling_is_due():
            return past_GOI
        own_GOI = second_moments(layer, block, *bases)
        return own_GOI if past_GOI is None else past_GOI.lerp(own_GOI, 1 - self._stat_decay)

    def _restored(self, tensors: dict[str, Any]) -> EkfacLayer:
        return EkfacLayer(**tensors)

    def _factors(self, layer: Layer) -> bool:
        return True

    def _factorization(self) -> str:
        return "eigh"


def second_moments(layer: Layer, block: BlockUses, basis_a_GII: Tensor, basis_g_GOO: Tensor) -> Tensor:
    """Return s_GOI = Σ_n (U_Γᵀ J_n U_A)² / N, with J_n of weight and bias together."""
    samples, total_GOI = 0, torch.zeros(())
    entries = basis_a_GII.shape[0] * basis_a_GII.shape[1] * basis_g_GOO.shape[1]
    single = all(use.g_NGPO.shape[2] == 1 for batch in block[layer.weight] for use in batch if hasattr(use, "g_NGPO"))
    for a_NGPI, g_NGPO in chunks(layer, block, 0 if single else entries):
        inputs = a_NGPI.shape[3]
        a_GNPI = a_NGPI.transpose(0, 1) @ basis_a_GII[:, None, :inputs]
        if layer.bias is not None:
            a_GNPI += basis_a_GII[:, None, inputs:]  # what the constant 1 becomes
        g_GNPO = g_NGPO.transpose(0, 1) @ basis_g_GOO[:, None]
        if a_GNPI.shape[2] == 1:  # the square of one outer product is the outer product of the squares
            own_GOI = g_GNPO[:, :, 0].square().mT @ a_GNPI[:, :, 0].square()
        else:
            own_GOI = (g_GNPO.mT @ a_GNPI).square_().sum(1)
        total_GOI = own_GOI if not samples else total_GOI.add_(own_GOI)
        samples += len(a_NGPI)
    return total_GOI / samples
