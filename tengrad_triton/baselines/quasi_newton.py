"""What K-BFGS and K-BFGS(L) share: Kronecker factors of the inverse Hessian, kept by quasi-Newton updates.

Dimensions: G groups, O outputs and I inputs of a group (see `kronecker`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tengrad_triton.baselines.base import Curvature, KroneckerOptimizer, Rows
from tengrad_triton.baselines.bfgs import Dense, Memory, doubly_damped
from tengrad_triton.baselines.kronecker import Layer, in_batches, input_factor, inverse, means, shifted
from tengrad_triton.curvature.target import Target
from tengrad_triton.optim.options import Unsupported
from tengrad_triton.optim.validation import check_range
from tengrad_triton.profiling import phase

B = TypeVar("B", Dense, Memory)
_POWELL = 0.2  # μ₁ of the double damping


@dataclass(frozen=True)
class KbfgsLayer(Generic[B]):
    """The running A, the inverses of both sides, and the running pair of the output side.

    Attributes:
        a_GII: the running A = Σ_p a aᵀ.
        input_side: H_a ≈ (A + √α I)⁻¹.
        output_side: H_g, the inverse of the loss's mean Hessian by a position's outputs.
        s_GO: the running mean of how far the mean output moved in a step.
        y_GO: the running mean of how far its derivative did.
    """

    a_GII: Tensor
    input_side: Dense
    output_side: B
    s_GO: Tensor
    y_GO: Tensor

    @property
    def running(self) -> Tensor:  # noqa: D102
        return self.a_GII

    def solve(self, v_GOI: Tensor) -> Tensor:
        """Return H_g V H_a."""
        return self.output_side.apply(v_GOI @ self.input_side.h_GOO)

    @property
    def form(self) -> str:
        """Return what is kept, for the summary."""
        outputs = str(self.s_GO.shape[1])
        if isinstance(self.output_side, Memory):
            outputs = f"{self.output_side.d_GM.shape[1]} pairs of {outputs}"
        return f"inverses {outputs} x {self.a_GII.shape[1]}"


@dataclass(frozen=True)
class Seen:
    """What a batch says of a layer: A, and the means of a and g over samples and positions."""

    layer: Layer
    a_GII: Tensor
    mean_a_GI: Tensor
    mean_g_GO: Tensor


class QuasiNewton(KroneckerOptimizer[KbfgsLayer[B]]):
    """What `KBFGS` and `KBFGSL` share: all but how H_g is kept."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: Mapping[str, Any],
        *,
        refresh_every: int | Callable[[int], int],
        stat_decay: float,
        unsupported: Unsupported,
        seed: int | None,
    ) -> None:
        check_range("stat_decay", stat_decay, 0.0, below=1.0)
        self._stat_decay = stat_decay
        super().__init__(
            model, params, defaults,
            rows=Rows("empirical"), refresh_every=refresh_every, unsupported=unsupported, seed=seed,
        )  # fmt: skip

    @abstractmethod
    def _identity(self, like_GO: Tensor) -> B:
        """Return H_g = I."""

    def _factors(self, layer: Layer) -> bool:
        # torch says so of its transposed convolutions: their a are derivatives, of which no output is made.
        module = next(block.layer for block in self._blocks if block.name == layer.block)
        return not getattr(module, "transposed", False)

    def _why_closure(self) -> str | None:
        if not self._refresh_is_due():
            return None
        return (
            f"{type(self).__name__} compares a batch's derivatives before and after the step: call step(closure), "
            "which clears the gradients, runs forward and backward, and returns the loss"
        )

    def _refresh_is_due(self) -> bool:
        return self._curvature is None or self._age >= self._interval()

    def _taken(
        self, targets: Sequence[Target], closure: Callable[[], Any] | None, loss: Any
    ) -> tuple[Curvature[KbfgsLayer[B]], int]:
        curvature = self._curvature
        if curvature is not None and not self._refresh_is_due():
            self._move(curvature, targets)
            return curvature, self._age
        assert closure is not None  # `_why_closure` has seen to it
        before = self._seen()
        with phase("curvature"):
            self._follow_schedules()
            curvature = self._with(curvature, before)
            outputs = self._outputs(curvature, {name: seen.mean_a_GI for name, seen in before.items()})
        self._move(curvature, targets)
        self._capture.forget()
        with torch.enable_grad():
            closure()
        uses, present = self._gathered()
        with phase("curvature"):
            after = {layer.name: means(layer, uses[layer.block]) for layer in present}
            moved = self._outputs(curvature, {name: mean_a_GI for name, (mean_a_GI, _) in after.items()})
            layers = {
                name: (layer, self._updated(layer, state, before[name], moved[name] - outputs[name], after[name][1]))
                if name in after
                else (layer, state)
                for name, (layer, state) in curvature.layers.items()
            }
        return Curvature(layers, curvature.updates, curvature.failures), 0

    def _seen(self) -> dict[str, Seen]:
        """Return what the batches since the last step say of every layer."""
        uses, layers = self._gathered()
        with phase("curvature"):
            return {
                layer.name: Seen(layer, input_factor(layer, uses[layer.block]), *means(layer, uses[layer.block]))
                for layer in layers
            }

    def _with(self, past: Curvature[KbfgsLayer[B]] | None, seen: Mapping[str, Seen]) -> Curvature[KbfgsLayer[B]]:
        """Return the curvature with a batch's A in the running one; layers that are new begin with H_g = I."""
        old = self._past([own.layer for own in seen.values()])
        fresh = {name: own for name, own in seen.items() if name not in old}
        inverses, failures = in_batches(
            [shifted(o.a_GII, o.a_GII.new_full((len(o.a_GII),), self._root_of(o.layer))) for o in fresh.values()],
            inverse,
        )
        begun = dict(zip(fresh, inverses, strict=True))
        layers = {}
        for name, own in seen.items():
            if name in old:
                state = replace(old[name], a_GII=old[name].a_GII.lerp(own.a_GII, 1 - self._stat_decay))
            else:
                none_GO = torch.zeros_like(own.mean_g_GO)
                state = KbfgsLayer(own.a_GII, Dense(begun[name]), self._identity(none_GO), none_GO, none_GO)
            layers[name] = (own.layer, state)
        earlier, updates = (0, 0) if past is None else (past.failures, past.updates)
        return Curvature(layers, updates + 1, failures.to(self._generator.device) + earlier)

    def _outputs(self, curvature: Curvature[KbfgsLayer[B]], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean output z_GO of every layer: what its weight makes of the mean input."""
        return {
            name: (self._matrix_of(layer, state) @ inputs[name][..., None])[..., 0]
            for name, (layer, state) in curvature.layers.items()
            if name in inputs
        }

    def _root_of(self, layer: Layer) -> float:
        """Return √α."""
        return self._damping_of(layer) ** 0.5

    def _updated(
        self, layer: Layer, state: KbfgsLayer[B], before: Seen, moved_GO: Tensor, mean_g_GO: Tensor
    ) -> KbfgsLayer[B]:
        """Return the state after one BFGS update of each side."""
        root, weight = self._root_of(layer), 1 - self._stat_decay
        sign = -1.0 if self.param_groups[self._group_of(layer)]["maximize"] else 1.0
        s_GO = state.s_GO.lerp(moved_GO, weight)
        y_GO = state.y_GO.lerp(sign * (mean_g_GO - before.mean_g_GO), weight)
        pair = doubly_damped(state.output_side, s_GO, y_GO, _POWELL, min(root, 1.0))
        direction_GI = state.input_side.apply(before.mean_a_GI[..., None])[..., 0]
        action_GI = (state.a_GII @ direction_GI[..., None])[..., 0] + root * direction_GI
        input_side = state.input_side.updated(direction_GI, action_GI)
        return KbfgsLayer(state.a_GII, input_side, state.output_side.updated(*pair), s_GO, y_GO)
