"""K-BFGS and K-BFGS(L), which differ in how they store the inverse of the output side (docs/math.md, M15)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack, override

from tengrad_triton.baselines.bfgs import DenseInverse, LimitedMemoryInverse
from tengrad_triton.baselines.quasi_newton import KbfgsState, QuasiNewton
from tengrad_triton.baselines.settings import QuasiNewtonSettings, document
from tengrad_triton.optim.validation import check_count


@document
class KBFGS(QuasiNewton[DenseInverse]):
    """Kronecker-factored BFGS (Goldfarb, Ren and Bahamou 2020, algorithm 4).

    A layer's block of the Hessian is approximated by A ⊗ B. A is a running mean of mean_n Σ_p a aᵀ, and B is the mean
    Hessian of the loss with respect to the outputs at one position. BFGS updates compute H_a ≈ (A + √α I)⁻¹ and
    H_g ≈ B⁻¹ (docs/math.md, M15):

        d = H_g ∇L H_a + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    The pair (s, y) of H_g is measured on one batch: s is the change of the layer's mean output in a step, and y is the
    change of the loss's derivative with respect to it. So a step that refreshes needs ``step(closure)``, and evaluates
    the closure once more after the update. Afterwards ``.grad`` holds the gradients after the step, and running
    statistics and the random state have advanced twice. The pair of H_a is s = H_a ā and y = (A + √α I) s.

    The paper averages gradients before it preconditions them; here the momentum follows, as in `TENGraD`. With constant
    H_a and H_g both are the same. Linear layers and convolutions are preconditioned, but not transposed convolutions.
    The loss must be a mean over the samples.

    Args:
        {model}
        damping: α > 0, or a function of the step; 0.03 by default. √α is added to A, and min(√α, 1) bounds sᵀ y / sᵀ s
            from below.
        {common}
        refresh_every: steps from one update of the inverses to the next, or a function of the step; 1 by default and
            in the paper.
        stat_decay: the decay of the running A, s and y, in [0, 1): the weight of their old value at an update; 0.9 by
            default.
    """

    state_key = "kbfgs"
    kernels = "BFGS"

    @override
    def _identity(self, like_GO: Tensor) -> DenseInverse:
        return DenseInverse.identity(like_GO)

    @override
    def _state_of(self, tensors: dict[str, Any]) -> KbfgsState[DenseInverse]:
        sides = {name: DenseInverse(**tensors[name]) for name in ("input_side", "output_side")}
        return KbfgsState(**{**tensors, **sides})


@document
class KBFGSL(QuasiNewton[LimitedMemoryInverse]):
    """`KBFGS` with H_g in limited memory (Goldfarb, Ren and Bahamou 2020): H_g is computed from I and the last pairs.

    H_a, the step, and the requirements on the loss and the closure are the same as in `KBFGS`.

    Args:
        {model}
        damping: α > 0, or a function of the step, as in `KBFGS`; 0.03 by default.
        {common}
        refresh_every: steps from one update of the inverses to the next, or a function of the step; 1 by default and
            in the paper.
        stat_decay: the decay of the running A, s and y, in [0, 1): the weight of their old value at an update; 0.9 by
            default.
        memory: the number of pairs, at least 1; 100 by default.
    """

    state_key = "kbfgsl"
    kernels = "L-BFGS, BFGS"

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-2,
        *,
        memory: int = 100,
        **settings: Unpack[QuasiNewtonSettings],
    ) -> None:
        check_count("memory", memory)
        self._memory = memory
        super().__init__(model, params, lr, **settings)

    @override
    def _identity(self, like_GO: Tensor) -> LimitedMemoryInverse:
        return LimitedMemoryInverse.identity(like_GO, self._memory)

    @override
    def _state_of(self, tensors: dict[str, Any]) -> KbfgsState[LimitedMemoryInverse]:
        input_side = DenseInverse(**tensors["input_side"])
        output_side = LimitedMemoryInverse(**tensors["output_side"])
        return KbfgsState(**{**tensors, "input_side": input_side, "output_side": output_side})
