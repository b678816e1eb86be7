"""K-BFGS: BFGS updates of both Kronecker factors of the inverse Hessian (docs/math.md, "The rivals")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.baselines.bfgs import Dense
from tengrad_triton.baselines.quasi_newton import KbfgsLayer, QuasiNewton
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported


class KBFGS(QuasiNewton[Dense]):
    """Kronecker-factored BFGS (Goldfarb, Ren, Bahamou 2020, algorithm 4), for linear layers and convolutions.

    The Hessian's block of a layer is near A ⊗ G, with A = Σ_p a aᵀ and G the mean Hessian by a position's outputs:

        d = H_g ∇L H_a + weight_decay θ;   m ← momentum m + d;   θ ← θ − lr m

    H_g takes a BFGS update with s and y the changes of the mean output and of its derivative by the step, on the same
    batch; H_a one with s = H_a ā and y = (A + √α I) s. So a step that refreshes needs ``step(closure)``, and evaluates
    the closure once more behind the step: the gradients are then those after it, and what a forward changes (running
    statistics, random numbers) is changed twice.

    The paper averages gradients before they are preconditioned; here the momentum is what it is in `TENGraD`, behind
    it. With H constant the two are the same.

    Args:
        model: the module that the training loop calls. The loss must be a mean over the samples.
        params: parameters or groups of them, with settings of their own as in `TENGraD`.
        lr: the learning rate, a number or a 0-dim tensor.
        damping: α > 0, or a function of the step: √α is added to A, and bounds sᵀ y / sᵀ s from below (at most 1).
        momentum: of the momentum buffer, in [0, 1).
        nesterov: whether to look ahead along the momentum.
        weight_decay: λ ≥ 0; added to the preconditioned gradient as λ θ.
        decoupled_weight_decay: shrink θ by 1 − lr λ instead.
        maximize: ascend.
        refresh_every: steps from one update of the inverses to the next, or a function of the step; the paper's is 1.
        stat_decay: what the running A, s and y keep of their past at an update.
        unsupported: what parameters get that have no factors, as in `KFAC`.
        seed: kept in the state; nothing is drawn.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    key = "kbfgs"

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
        refresh_every: int | Callable[[int], int] = 1,
        stat_decay: float = 0.9,
        unsupported: Unsupported = "sgd",
        seed: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(
            model, params, defaults,
            refresh_every=refresh_every, stat_decay=stat_decay, unsupported=unsupported, seed=seed,
        )  # fmt: skip

    def _identity(self, like_GO: Tensor) -> Dense:
        eye_OO = torch.eye(like_GO.shape[1], dtype=like_GO.dtype, device=like_GO.device)
        return Dense(eye_OO.repeat(len(like_GO), 1, 1))

    def _restored(self, tensors: dict[str, Any]) -> KbfgsLayer[Dense]:
        sides = {name: Dense(**tensors[name]) for name in ("input_side", "output_side")}
        return KbfgsLayer(**{**tensors, **sides})

    def _factorization(self) -> str:
        return "BFGS"
