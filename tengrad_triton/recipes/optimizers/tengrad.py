"""TENGraD with the library's defaults, with the paper's settings, and without scaling."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt, ResolvedExistingFile
from torch import nn
from typing_extensions import override

from tengrad_triton.curvature.choices import Representation
from tengrad_triton.likelihoods import Fisher
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.options import UNSCALED
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.recipes.optimizers.settings import LayerSizes, OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class ExactSettings(OptimizerSettings):
    """What every TENGraD has in common."""

    @staticmethod
    @override
    def curvature_numbers(layer: LayerSizes, samples: int) -> int:
        """Count J in its smaller form, and the factor of the matrix of its inner products."""
        a_row = min(layer.parameters, layer.positions * (layer.inputs + layer.outputs))
        return samples * a_row + samples**2


@Parameter(group="TENGraD")
@dataclass(frozen=True, kw_only=True)
class TengradSettings(ExactSettings):
    """TENGraD with the library's defaults: scaled damping, a mean of gradients, refreshes that grow rarer."""

    lr: PositiveFloat = 0.01
    "Learning rate."
    damping: PositiveFloat = 10.0
    "Damping: multiples of the scale D, which has the gradient's size in every direction."
    scaling: Literal["kronecker", "diagonal"] = "kronecker"
    "Form of the scale D."
    momentum: NonNegativeFloat = 0.9
    "Share of the earlier gradients in the mean that a step follows."
    weight_decay: NonNegativeFloat = 0.0
    "Weight decay."
    representation: Literal["auto"] | Representation = "auto"
    "How a layer's curvature is stored."
    plan: ResolvedExistingFile | None = None
    "Plan file of tengrad-triton autotune; the cost model chooses if not given."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return TENGraD(model, **asdict(self))

    @override
    def refreshes(self, steps: int) -> Sequence[int]:
        return Growing().refreshes(steps)


@Parameter(group="TENGraD, as in the paper")
@dataclass(frozen=True, kw_only=True)
class TengradPaperSettings(ExactSettings):
    """TENGraD with the paper's settings: absolute damping and refreshes at a fixed interval."""

    lr: PositiveFloat = 0.005
    "Learning rate."
    damping: PositiveFloat = 0.1
    "Number added to the diagonal of the Fisher matrix before it is inverted."
    refresh_every: PositiveInt = 100
    "Steps between two refreshes of the curvature."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."
    fisher: Fisher = "sampled"
    "Labels of the Fisher matrix: sampled from the model, the data's own, or all classes."
    representation: Literal["auto"] | Representation = "auto"
    "How a layer's curvature is stored."
    plan: ResolvedExistingFile | None = None
    "Plan file of tengrad-triton autotune; the cost model chooses if not given."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return TENGraD.paper(model, **asdict(self))


@Parameter(group="TENGraD, without scaling")
@dataclass(frozen=True, kw_only=True)
class TengradUnscaledSettings(ExactSettings):
    """TENGraD without scaling: relative damping, a trust region, look-ahead, refreshes that grow rarer."""

    lr: PositiveFloat = 0.03
    "Learning rate."
    damping: PositiveFloat = 0.003
    "Damping, relative to the trace of each block."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.0
    "Weight decay."
    trust_region: PositiveFloat = 3e-4
    "Upper bound of a step's squared Fisher norm."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return TENGraD.unscaled(model, **asdict(self))

    @override
    def refreshes(self, steps: int) -> Sequence[int]:
        every: Growing = UNSCALED["refresh_every"]
        return every.refreshes(steps)
