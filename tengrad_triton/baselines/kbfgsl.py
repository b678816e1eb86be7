"""K-BFGS(L): the output side in limited memory (docs/math.md, "The rivals")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from tengrad_triton.baselines.bfgs import Dense, Memory
from tengrad_triton.baselines.quasi_newton import KbfgsLayer, QuasiNewton
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported, check_count


class KBFGSL(QuasiNewton[Memory]):
    """`KBFGS` with H_g in limited memory: the last ``memory`` pairs on top of I. H_a is what it is there.

    Args:
        model: as in `KBFGS`, like all that is not named here.
        params: see there.
        lr: see there.
        damping: see there.
        momentum: see there.
        nesterov: see there.
        weight_decay: see there.
        decoupled_weight_decay: see there.
        maximize: see there.
        refresh_every: see there.
        stat_decay: see there.
        memory: how many pairs are kept.
        unsupported: see there.
        seed: see there.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """

    key = "kbfgsl"

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
        memory: int = 100,
        unsupported: Unsupported = "sgd",
        seed: int | None = None,
    ) -> None:
        check_count("memory", memory)
        self._memory = memory
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(
            model, params, defaults,
            refresh_every=refresh_every, stat_decay=stat_decay, unsupported=unsupported, seed=seed,
        )  # fmt: skip

    def _identity(self, like_GO: Tensor) -> Memory:
        return Memory.empty(like_GO, self._memory)

    def _restored(self, tensors: dict[str, Any]) -> KbfgsLayer[Memory]:
        sides = {"input_side": Dense(**tensors["input_side"]), "output_side": Memory(**tensors["output_side"])}
        return KbfgsLayer(**{**tensors, **sides})

    def _factorization(self) -> str:
        return "L-BFGS, BFGS"
