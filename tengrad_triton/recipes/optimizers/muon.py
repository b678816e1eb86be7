"""Muon for the hidden weights and AdamW for all other parameters, as one optimizer.

Key: a weight as a matrix has O outputs and I inputs (of a convolution: input channels times kernel size).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from typing_extensions import override


@Parameter(group="Muon")
@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """torch's Muon for the hidden weights and torch's AdamW for the rest, with torch's defaults."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
    lr: PositiveFloat = 1e-3
    "Learning rate of both."
    momentum: NonNegativeFloat = 0.95
    "Nesterov momentum of Muon."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay of the hidden weights."
    adjust: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    "How a step is scaled with the shape of the matrix; match_rms_adamw gives learning rates the scale of AdamW's."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "Decay rates of AdamW's running means."
    adamw_weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay of the rest."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return both as one optimizer; raises `ValueError` if the model has no hidden weights."""
        return MuonWithAdamW(model, self)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer. Muon gets a hidden weight as a matrix [O, I] that shares its memory."""

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
        # The same dictionaries, so that a scheduler of this optimizer changes the learning rates of both.
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None."""
        for parameter in (*self._hidden, *self._rest):
            parameter.grad = None

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; return the loss of the closure, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrix_OI, weight in zip(self._matrices, self._hidden, strict=True):
            matrix_OI.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of both."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]


def hidden_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of all linear and convolution layers but the first and the last."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer.weight for layer in [m for m in model.modules() if isinstance(m, kinds)][1:-1]]
