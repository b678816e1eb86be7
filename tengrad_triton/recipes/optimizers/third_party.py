"""SOAP and Shampoo from the package pytorch-optimizer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from typing_extensions import override

from tengrad_triton.recipes.optimizers.settings import OptimizerSettings

PACKAGE = "pytorch_optimizer"


@Parameter(group="SOAP")
@dataclass(frozen=True, kw_only=True)
class SoapSettings(OptimizerSettings):
    """SOAP (Vyas et al. 2024)."""

    package: ClassVar[str] = PACKAGE
    in_paper: ClassVar[bool] = False
    lr: PositiveFloat = 0.003
    "Learning rate."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.95, 0.95)
    "Decay rates of the running means of the gradient and of its square."
    refresh_every: PositiveInt = 10
    "Steps between two updates of the eigenbasis."
    weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return _build("SOAP", model, asdict(self), every="precondition_frequency")


@Parameter(group="Shampoo")
@dataclass(frozen=True, kw_only=True)
class ShampooSettings(OptimizerSettings):
    """Shampoo (Gupta, Koren and Singer 2018): one factor for each axis of a weight.

    Unsuitable for layers with many thousands of inputs: the root of their factor takes minutes.
    """

    package: ClassVar[str] = PACKAGE
    in_paper: ClassVar[bool] = False
    lr: PositiveFloat = 0.1
    "Learning rate; at a tenth of the default the loss on the digits hardly falls."
    refresh_every: PositiveInt = 1
    "Steps between two computations of the factors' roots; parameters do not move before the first."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return _build("Shampoo", model, asdict(self), every="preconditioning_compute_steps", weight_decouple=True)

    @override
    def refreshes(self, steps: int) -> Sequence[int]:
        return range(self.refresh_every - 1, steps, self.refresh_every)


def _build(name: str, model: nn.Module, settings: dict[str, Any], every: str, **more: Any) -> torch.optim.Optimizer:
    """Return an optimizer of the package; ``every`` is what it calls `refresh_every`."""
    import pytorch_optimizer  # noqa: PLC0415

    settings[every] = settings.pop("refresh_every")
    optimizer: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(model.parameters(), **settings, **more)
    return optimizer
