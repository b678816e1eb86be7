"""Muon as its users run it: torch's own for the hidden weights, taken as matrices, and AdamW for all other parameters.

Key: O outputs, I what one of them is computed from (an input's channels times a kernel's pixels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn


@Parameter(group="Muon")
@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """torch's Muon for hidden weights, with torch's AdamW for the rest; the defaults are torch's."""

    needs: ClassVar[str] = "torch"
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 1e-3
    "Learning rate of both."
    momentum: NonNegativeFloat = 0.95
    "Muon's momentum, by Nesterov's rule."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay of the hidden weights."
    adjust: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    "How a step is scaled by the matrix's shape; match_rms_adamw makes rates mean what AdamW's do."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "AdamW's decay rates."
    adamw_weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay of the rest."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return both as one optimizer; raises `ValueError` for a model without hidden weights."""
        return MuonWithAdamW(model, self)


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one. A hidden weight is given to Muon as a matrix [O, I] that shares its memory."""

    def __init__(self, model: nn.Module, settings: MuonSettings) -> None:
        self._hidden = hidden_weights(model)
        if not self._hidden:
            raise ValueError("muon needs a weight between the first and the last layer, got none: use adamw")
        chosen = {id(weight) for weight in self._hidden}
        self._rest = [p for p in model.parameters() if id(p) not in chosen]
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in self._hidden]
        super().__init__([*self._hidden, *self._rest], {})
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            adjust_lr_fn=settings.adjust,
        )
        self._adamw = torch.optim.AdamW(
            self._rest, lr=settings.lr, betas=settings.betas, weight_decay=settings.adamw_weight_decay
        )
        # The same objects, so that a scheduler of this one schedules those.
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        for parameter in (*self._hidden, *self._rest):
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrix_OI, weight in zip(self._matrices, self._hidden, strict=True):
            matrix_OI.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from both states."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]


def hidden_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear and convolution layers between the first and the last of them."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer.weight for layer in [m for m in model.modules() if isinstance(m, kinds)][1:-1]]
