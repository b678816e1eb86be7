"""torch's SGD and AdamW."""

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from torch import nn


@Parameter(group="SGD")
@dataclass(frozen=True, kw_only=True)
class SgdSettings:
    """torch's SGD with momentum."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.05
    "Learning rate."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD over all parameters."""
        return torch.optim.SGD(model.parameters(), **asdict(self))


@Parameter(group="AdamW")
@dataclass(frozen=True, kw_only=True)
class AdamwSettings:
    """torch's AdamW."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.01
    "Learning rate."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "Decay rates of the running means of the gradient and of its square."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), **asdict(self))
