"""The settings of Muon for the hidden weights, with AdamW for all other parameters."""

from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from torch import nn
from typing_extensions import override

from tengrad_triton.recipes.optimizers.muon_with_adamw import Adjust, MuonWithAdamW
from tengrad_triton.recipes.optimizers.settings import OptimizerSettings


@Parameter(group="Muon")
@dataclass(frozen=True, kw_only=True)
class MuonSettings(OptimizerSettings):
    """torch's Muon for the hidden weights and torch's AdamW for the rest, with torch's defaults."""

    lr: PositiveFloat = 1e-3
    "Learning rate of both."
    momentum: NonNegativeFloat = 0.95
    "Nesterov momentum of Muon."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay of the hidden weights."
    adjust: Adjust = "match_rms_adamw"
    "How a step is scaled with the shape of the matrix; match_rms_adamw gives learning rates the scale of AdamW's."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "Decay rates of AdamW's running means."
    adamw_weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay of the rest."

    @override
    def build(self, model: nn.Module) -> MuonWithAdamW:
        """Return both as one optimizer; raises `ValueError` if the model has no hidden weights."""
        return MuonWithAdamW(model, **asdict(self))
