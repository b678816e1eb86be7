"""The base class of K-BFGS and K-BFGS(L): Kronecker factors of the inverse Hessian, by BFGS (docs/math.md, M15).

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.base import KroneckerOptimizer
from tengrad_triton.baselines.batch_factors import input_factor, mean_input_and_grad
from tengrad_triton.baselines.bfgs import DenseInverse, LimitedMemoryInverse, double_damping
from tengrad_triton.baselines.kronecker import KroneckerLayer, LayerBatch
from tengrad_triton.baselines.kronecker_curvature import KroneckerCurvature
from tengrad_triton.baselines.linalg import add_to_diagonal, by_size, inverse
from tengrad_triton.baselines.settings import Common, fisher_options
from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.target import Target
from tengrad_triton.optim.damping import restored_on_error
from tengrad_triton.optim.validation import check_range
from tengrad_triton.profiling import phase

H = TypeVar("H", DenseInverse, LimitedMemoryInverse)
_MU_1 = 0.2  # μ₁ of the double damping


@dataclass(frozen=True)
class KbfgsState(Generic[H]):
    """The running A of a layer, the inverses of both sides, and the running pair of the output side.

    Attributes:
        a_GII: the running mean of mean_n Σ_p a aᵀ.
        input_side: H_a ≈ (A + √α I)⁻¹.
        output_side: H_g, the inverse of the loss's mean Hessian with respect to the outputs at one position.
        s_GO: the running mean of the change of the mean output in a step.
        y_GO: the running mean of the change of the loss's derivative with respect to the mean output.
    """

    a_GII: Tensor
    input_side: DenseInverse
    output_side: H
    s_GO: Tensor
    y_GO: Tensor

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return H_g V H_a."""
        return self.output_side.apply(v_GOI @ self.input_side.h_GOO)

    @property
    def representation(self) -> str:
        """Return a description of the state, for the summary."""
        outputs = str(self.s_GO.shape[1])
        if isinstance(self.output_side, LimitedMemoryInverse):
            outputs = f"{self.output_side.d_GM.shape[1]} pairs of {outputs}"
        return f"inverses {outputs} x {self.a_GII.shape[1]}"


@dataclass(frozen=True)
class Means:
    """Means over the samples and positions of a batch, for one layer.

    Attributes:
        a_GI: the mean input ā.
        g_GO: the mean derivative ḡ of the loss with respect to the output.
        z_GO: the mean output z̄ = W ā, computed with the parameters of that batch.
    """

    a_GI: Tensor
    g_GO: Tensor
    z_GO: Tensor


class QuasiNewton(KroneckerOptimizer[KbfgsState[H]]):
    """An optimizer with an inverse Hessian H_a ⊗ H_g for every layer. A subclass defines how H_g is stored.

    Its arguments are those of `KBFGS`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        refresh_every: int | Callable[[int], int] = 1,
        stat_decay: float = 0.9,
        **common: Unpack[Common],
    ) -> None:
        check_range("stat_decay", stat_decay, 0.0, below=1.0)
        self._stat_decay = stat_decay
        gradients = fisher_options(
            "empirical", "categorical", 1
        )  # the derivatives of the loss itself: no label is drawn
        super().__init__(model, params, lr, refresh_every, gradients, **common)

    @override
    def _new_capture(self, layers: Sequence[LayerParams]) -> Capture:
        for layer in layers:
            if len({bool(self.param_groups[index]["maximize"]) for index in layer.groups.values()}) > 1:
                raise ValueError(
                    f"{type(self).__name__} approximates one Hessian for all parameters of {layer.name!r}, so they are "
                    "all minimized or all maximized: give their parameter groups the same maximize"
                )
        return super()._new_capture(layers)

    @abstractmethod
    def _identity(self, like_GO: Tensor) -> H:
        """Return H_g = I for vectors of this shape, dtype and device."""

    @override
    def _supports(self, layer: KroneckerLayer) -> bool:
        # torch sets `transposed` for transposed convolutions. Their a are output gradients, so W ā is no mean output.
        return not getattr(self._params_of(layer).layer, "transposed", False)

    @override
    def _why_closure(self) -> str | None:
        if not self._refresh_is_due():
            return None
        return (
            f"{type(self).__name__} compares a batch's derivatives before and after the step: call step(closure), "
            "where the closure clears the gradients, runs forward and backward, and returns the loss"
        )

    @override
    def _refresh_is_due(self) -> bool:
        return self._curvature_is_outdated(self.refresh_every)

    @override
    def _take_step(
        self, targets: Sequence[Target], grads: Sequence[Tensor], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[KroneckerCurvature[KbfgsState[H]], int]:
        curvature = self._curvature
        if curvature is not None and not self._refresh_is_due():
            self._update_targets(curvature, targets, grads, None)
            return curvature, self._age
        assert closure is not None  # `step` has raised otherwise
        curvature, before = self._with_input_factors()
        with restored_on_error(targets):
            self._update_targets(curvature, targets, grads, None)
            self._capture.forget()
            with torch.enable_grad():
                closure()
            batches = self._gather()
            with phase("curvature"):
                after = self._means_of(batches)
                states = {
                    layer: self._updated(layer, state, before[layer], after[layer]) if layer in after else state
                    for layer, state in curvature.layers.items()
                }
        return replace(curvature, layers=states), 0

    def _with_input_factors(self) -> tuple[KroneckerCurvature[KbfgsState[H]], dict[KroneckerLayer, Means]]:
        """Return the curvature, with the A of the captured batches added, and the means of these batches."""
        batches = self._gather()
        with phase("curvature"):
            self._follow_schedules()
            previous, before = self._previous(batches), self._means_of(batches)
            factors = {batch.layer: input_factor(batch) for batch in batches}
            initial, failures = self._initial_states(
                {layer: a_GII for layer, a_GII in factors.items() if layer not in previous}, before
            )
            weight = 1 - self._stat_decay
            averaged = {
                layer: replace(state, a_GII=state.a_GII.lerp(factors[layer], weight))
                for layer, state in previous.items()
            }
            states = {layer: initial[layer] if layer in initial else averaged[layer] for layer in factors}
            return KroneckerCurvature(states, self._batch_count(), self._failures_with(failures)), before

    def _initial_states(
        self, factors: Mapping[KroneckerLayer, Tensor], means: Mapping[KroneckerLayer, Means]
    ) -> tuple[dict[KroneckerLayer, KbfgsState[H]], Tensor]:
        """Return states with H_a = (A + √α I)⁻¹ and H_g = I for the given A, and how many factorizations failed."""
        shifted = [
            add_to_diagonal(a_GII, a_GII.new_full((len(a_GII),), self._root_damping(layer)))
            for layer, a_GII in factors.items()
        ]
        inverses, failures = by_size(inverse, shifted)
        states = {}
        for (layer, a_GII), h_GII in zip(factors.items(), inverses, strict=True):
            zeros_GO = torch.zeros_like(means[layer].g_GO)
            states[layer] = KbfgsState(a_GII, DenseInverse(h_GII), self._identity(zeros_GO), zeros_GO, zeros_GO)
        return states, failures

    def _means_of(self, batches: Sequence[LayerBatch]) -> dict[KroneckerLayer, Means]:
        """Return the means of each layer; its mean output is computed with the present parameters."""
        found = {}
        for batch in batches:
            a_GI, g_GO = mean_input_and_grad(batch)
            parameters = self._params_of(batch.layer).parameters
            tensors = {param_name: parameters[param_name].detach() for param_name in batch.layer.param_names}
            w_GOI = batch.layer.to_matrix(tensors, len(a_GI), a_GI.dtype)
            found[batch.layer] = Means(a_GI, g_GO, (w_GOI @ a_GI[..., None])[..., 0])
        return found

    def _root_damping(self, layer: KroneckerLayer) -> float:
        """Return √α."""
        return float(self._setting_of(layer, "damping")) ** 0.5

    def _updated(
        self, layer: KroneckerLayer, state: KbfgsState[H], before: Means, after: Means
    ) -> KbfgsState[H]:  # fmt: skip
        """Return the state after one BFGS update of each side."""
        root, weight = self._root_damping(layer), 1 - self._stat_decay
        sign = -1.0 if self._setting_of(layer, "maximize") else 1.0
        s_GO = state.s_GO.lerp(after.z_GO - before.z_GO, weight)
        y_GO = state.y_GO.lerp(sign * (after.g_GO - before.g_GO), weight)
        pair = double_damping(state.output_side, s_GO, y_GO, _MU_1, min(root, 1.0))
        s_GI = state.input_side.apply(before.a_GI[..., None])[..., 0]
        y_GI = (state.a_GII @ s_GI[..., None])[..., 0] + root * s_GI
        return KbfgsState(
            state.a_GII, state.input_side.updated(s_GI, y_GI), state.output_side.updated(*pair), s_GO, y_GO
        )
