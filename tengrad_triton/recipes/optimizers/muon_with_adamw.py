"""Muon for the hidden weights and AdamW for all other parameters, as one optimizer; it needs torch alone.

Key: a weight as a matrix has O outputs and I inputs (of a convolution: input channels times kernel size).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

Adjust = Literal["original", "match_rms_adamw"]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer. Muon gets a hidden weight as a matrix [O, I] that shares its memory.

    Args:
        model: a model with a weight between the first and the last layer; otherwise `ValueError` is raised.
        lr: the learning rate of both.
        momentum: Nesterov momentum of Muon.
        weight_decay: decoupled weight decay of the hidden weights.
        adjust: how a step is scaled with the shape of the matrix.
        betas: decay rates of AdamW's running means.
        adamw_weight_decay: decoupled weight decay of the other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        adjust: Adjust = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: float = 0.01,
    ) -> None:
        self._hidden = hidden_weights(model)
        if not self._hidden:
            raise ValueError("muon needs a weight between the first and the last layer, got none: use adamw")
        chosen = {id(weight) for weight in self._hidden}
        self._rest = [p for p in model.parameters() if id(p) not in chosen]
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in self._hidden]
        super().__init__([*self._hidden, *self._rest], {})
        self._muon = torch.optim.Muon(
            self._matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn=adjust
        )
        self._adamw = torch.optim.AdamW(self._rest, lr=lr, betas=betas, weight_decay=adamw_weight_decay)
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
