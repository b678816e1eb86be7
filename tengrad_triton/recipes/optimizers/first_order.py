"""torch's SGD and AdamW."""

from dataclasses import asdict, dataclass
from typing import Annotated

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from torch import nn
from typing_extensions import override

from tengrad_triton.recipes.optimizers.settings import OptimizerSettings


@Parameter(group="SGD")
@dataclass(frozen=True, kw_only=True)
class SgdSettings(OptimizerSettings):
    """torch's SGD with momentum."""

    lr: PositiveFloat = 0.05
    "Learning rate."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), **asdict(self))


@Parameter(group="AdamW")
@dataclass(frozen=True, kw_only=True)
class AdamwSettings(OptimizerSettings):
    """torch's AdamW."""

    lr: PositiveFloat = 0.01
    "Learning rate."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "Decay rates of the running means of the gradient and of its square."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), **asdict(self))
