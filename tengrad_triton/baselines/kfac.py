"""K-FAC: a layer's Fisher block as the Kronecker product of two small factors (docs/math.md, "The rivals").

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.baselines.base import Curvature, Gathered, KroneckerOptimizer, Rows
from tengrad_triton.baselines.kronecker import Layer, in_batches, input_factor, inverse, output_factor, shifted
from tengrad_triton.curvature.target import Target
from tengrad_triton.likelihoods import Fisher, Likelihood
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported, check_count, is_number
from tengrad_triton.optim.validation import check_range
from tengrad_triton.profiling import phase


@dataclass(frozen=True)
class KfacLayer:
    """The running factors, and the damped inverses that the steps use."""

    a_GII: Tensor
    g_GOO: Tensor
    inverse_a_GII: Tensor
    inverse_g_GOO: Tensor

    @property
    def running(self) -> Tensor:  # noqa: D102
        return self.a_GII

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return (Γ + √α / π I)⁻¹ V (A + π √α I)⁻¹."""
        return self.inverse_g_GOO @ v_GOI @ self.inverse_a_GII

    @property
    def form(self) -> str:  # noqa: D102
        return f"factors {self.g_GOO.shape[1]} x {self.a_GII.shape[1]}"


class KFAC(KroneckerOptimizer[KfacLayer]):
    """Kronecker-factored approximate curvature (Martens and Grosse 2015; convolutions: Grosse and Martens 2016).

    F ≈ A ⊗ Γ for every layer, weight and bias together, with the running means of A = Σ_p a aᵀ and Γ = g gᵀ;

        d = (Γ + √α / π I)⁻¹ ∇L (A + π √α I)⁻¹ + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    Args:
        model: the module that the training loop calls.
        params: parameters or groups of them, with settings of their own as in `TENGraD`.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: α > 0, or a function of the step; split over the factors by π² = (tr A / I) / (tr Γ / O).
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum.
        weight_decay: λ ≥ 0; added to the preconditioned gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        maximize: ascend.
        refresh_every: steps from one inversion of the factors to the next, or a function of the step.
        factors_every: steps from one batch that the running factors see to the next; as ``refresh_every`` if None.
        stat_decay: the most that the running factors keep of their past at a batch; of k batches, 1 − 1/k at most.
        kl_clip: κ: the preconditioned gradient is shortened where Σ lr² ⟨d, ∇L⟩ is beyond it. None for no bound.
        fisher: ``"sampled"``, ``"exact"`` or ``"empirical"``, as in `TENGraD`.
        likelihood: as in `TENGraD`.
        fisher_samples: labels drawn for each sample.
        unsupported: what parameters get that have no factors: ``"sgd"``, the plain step and one warning, or ``"error"``
            for those that no rule covers.
        seed: of the generator that draws labels; torch's initial seed by default.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    key = "kfac"

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
        check_count("fisher_samples", fisher_samples)
        self._factors_every, self._stat_decay, self._kl_clip = factors_every, stat_decay, kl_clip
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
        every = self._factors_every
        return self._inversion_is_due() or (every is not None and self._steps % every == 0)

    def _inversion_is_due(self) -> bool:
        return self._curvature is None or self._age >= self._interval()

    def _taken(
        self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[Curvature[KfacLayer], int]:
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            curvature, age = self._refreshed()
        self._move(curvature, targets, self._kl_clip)
        return curvature, age

    def _refreshed(self) -> tuple[Curvature[KfacLayer], int]:
        uses, layers = self._gathered()
        before = self._curvature
        with phase("curvature"):
            updates = 1 if before is None else before.updates + 1
            weight = 1 - min(1 - 1 / updates, self._stat_decay)
            past = self._past(layers)
            running = {layer.name: averaged(layer, uses, past.get(layer.name), weight) for layer in layers}
            if before is not None and not self._inversion_is_due():
                kept = {
                    layer.name: (layer, KfacLayer(*running[layer.name], old.inverse_a_GII, old.inverse_g_GOO))
                    for layer in layers
                    if (old := past.get(layer.name)) is not None
                }
                return Curvature(kept, updates, before.failures), self._age
            self._follow_schedules()
            pairs = [damped(*running[layer.name], self._damping_of(layer)) for layer in layers]
            inverses, failures = in_batches([factor for pair in pairs for factor in pair], inverse)
            states = {
                layer.name: (layer, KfacLayer(*running[layer.name], *inverses[2 * index : 2 * index + 2]))
                for index, layer in enumerate(layers)
            }
            earlier = 0 if before is None else before.failures
            return Curvature(states, updates, failures + earlier), 0

    def _restored(self, tensors: dict[str, Any]) -> KfacLayer:
        return KfacLayer(**tensors)

    def _factors(self, layer: Layer) -> bool:
        return True

    def _factorization(self) -> str:
        return "cholesky_ex, cholesky_inverse"


def averaged(layer: Layer, uses: Gathered, past: Any, weight: float) -> tuple[Tensor, Tensor]:
    """Return a layer's running factors after a batch that counts ``weight``."""
    batch = (input_factor(layer, uses[layer.block]), output_factor(layer, uses[layer.block]))
    return batch if past is None else (past.a_GII.lerp(batch[0], weight), past.g_GOO.lerp(batch[1], weight))


def damped(a_GII: Tensor, g_GOO: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return A + π √α I and Γ + √α / π I (Martens and Grosse 2015, section 6.3)."""
    tiny = torch.finfo(a_GII.dtype).tiny
    mean_a_G, mean_g_G = (m.diagonal(dim1=1, dim2=2).mean(1).clamp(min=tiny) for m in (a_GII, g_GOO))
    pi_G = mean_a_G.sqrt() / mean_g_G.sqrt()
    return shifted(a_GII, pi_G * damping**0.5), shifted(g_GOO, damping**0.5 / pi_G)


def check_running(factors_every: Any, stat_decay: Any, kl_clip: Any) -> None:
    """Reject settings of the running factors and of the bound on a step."""
    check_count("factors_every", factors_every, optional=True)
    check_range("stat_decay", stat_decay, 0.0, below=1.0)
    if kl_clip is not None and not (is_number(kl_clip) and 0 < kl_clip < float("inf")):
        raise ValueError(f"kl_clip must be positive, or None for no bound, got {kl_clip!r}")
