"""TENGraD with the paper's settings, with the library's defaults, and without scaling."""

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt, ResolvedExistingFile
from torch import nn

from tengrad_triton.curvature.choices import Representation
from tengrad_triton.likelihoods import Fisher
from tengrad_triton.optim.tengrad import TENGraD


@Parameter(group="TENGraD")
@dataclass(frozen=True, kw_only=True)
class TengradSettings:
    """TENGraD with the paper's settings: absolute damping and refreshes at a fixed interval."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return TENGraD over all parameters."""
        return TENGraD.paper(model, **asdict(self))


@Parameter(group="TENGraD, by its defaults")
@dataclass(frozen=True, kw_only=True)
class TengradDefaultsSettings:
    """TENGraD with the library's defaults: scaled damping, a mean of gradients, refreshes that grow rarer."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return TENGraD over all parameters."""
        return TENGraD(model, **asdict(self))


@Parameter(group="TENGraD, without scaling")
@dataclass(frozen=True, kw_only=True)
class TengradUnscaledSettings:
    """TENGraD without scaling: relative damping, a trust region, look-ahead, refreshes that grow rarer."""

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
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

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return TENGraD over all parameters."""
        return TENGraD.unscaled(model, **asdict(self))
