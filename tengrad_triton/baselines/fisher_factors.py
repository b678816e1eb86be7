"""The base class of K-FAC and EKFAC: running Kronecker factors of each layer's Fisher block (docs/math.md, M15).

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.base import KroneckerOptimizer
from tengrad_triton.baselines.batch_factors import input_factor, output_factor
from tengrad_triton.baselines.kronecker import KroneckerLayer, LayerBatch
from tengrad_triton.baselines.kronecker_curvature import KroneckerCurvature, LayerState
from tengrad_triton.baselines.settings import Common, check_running_factors, fisher_options
from tengrad_triton.curvature.target import Target
from tengrad_triton.likelihoods import Fisher, Likelihood

BothSides = dict[KroneckerLayer, tuple[Tensor, Tensor]]
"""For each layer, a matrix of the input side [G, I, I] and one of the output side [G, O, O]."""


class FactorState(LayerState, Protocol):
    """A layer's state with both running factors."""

    @property
    def g_GOO(self) -> Tensor:
        """Return the running output factor Γ."""


F = TypeVar("F", bound=FactorState)


class FisherFactorOptimizer(KroneckerOptimizer[F]):
    """An optimizer with F ≈ A ⊗ Γ for every layer. A subclass defines how F is inverted.

    Its arguments are those of `KFAC`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        refresh_every: int | Callable[[int], int] = 100,
        factors_every: int | None = None,
        stat_decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        fisher: Fisher = "sampled",
        likelihood: str | Likelihood = "categorical",
        fisher_samples: int = 1,
        **common: Unpack[Common],
    ) -> None:
        check_running_factors(factors_every, stat_decay, kl_clip)
        options = fisher_options(fisher, likelihood, fisher_samples)
        self._factors_every, self._stat_decay, self._kl_clip = factors_every, stat_decay, kl_clip
        super().__init__(model, params, lr, refresh_every, options, **common)

    @abstractmethod
    def _refreshed(self) -> tuple[KroneckerCurvature[F], int]:
        """Return the curvature, updated by the batches since the last step, and its age in steps."""

    @override
    def _why_closure(self) -> str | None:
        return None

    @override
    def _supports(self, layer: KroneckerLayer) -> bool:
        return True

    @override
    def _take_step(
        self, targets: Sequence[Target], grads: Sequence[Tensor], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[KroneckerCurvature[F], int]:
        curvature, age = self._curvature, self._age
        if curvature is None or self._refresh_is_due():
            curvature, age = self._refreshed()
        self._update_targets(curvature, targets, grads, self._kl_clip)
        return curvature, age

    def _inversion_is_due(self) -> bool:
        """Whether the next step inverts the running factors."""
        return self._curvature_is_outdated(self.refresh_every)

    def _factors_are_due(self) -> bool:
        """Whether the next step adds its batch to the running factors, even if it does not invert them."""
        return self._factors_every is not None and self._steps % self._factors_every == 0

    def _running_factors(
        self, batches: Sequence[LayerBatch], previous: Mapping[KroneckerLayer, F]
    ) -> tuple[BothSides, int]:
        """Return the running A and Γ, to which this step's batch is added, and the number of their batches."""
        count = self._batch_count()
        weight = 1 - min(1 - 1 / count, self._stat_decay)
        running = {}
        for batch in batches:
            a_GII, g_GOO = input_factor(batch), output_factor(batch)
            old = previous.get(batch.layer)
            if old is not None:
                a_GII, g_GOO = old.a_GII.lerp(a_GII, weight), old.g_GOO.lerp(g_GOO, weight)
            running[batch.layer] = (a_GII, g_GOO)
        return running, count
