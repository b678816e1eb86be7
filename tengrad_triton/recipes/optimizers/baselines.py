"""K-FAC and its relatives from `tengrad_triton.baselines`.

The defaults of K-FAC, EKFAC and K-BFGS are what the paper tuned for 3C1F on Fashion-MNIST (Soori et al. 2021, table 3).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from typing_extensions import override

from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC
from tengrad_triton.recipes.optimizers.settings import LayerSizes, OptimizerSettings

PACKAGE = "tengrad_triton.baselines"


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(OptimizerSettings):
    """The settings that all baselines share."""

    package: ClassVar[str] = PACKAGE
    optimizer: ClassVar[Callable[..., torch.optim.Optimizer]]
    lr: PositiveFloat
    "Learning rate."
    damping: PositiveFloat
    "Damping of the curvature."
    refresh_every: PositiveInt = 100
    "Steps between two refreshes of the curvature."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat
    "Weight decay."

    @override
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return type(self).optimizer(model, **asdict(self))

    @staticmethod
    @override
    def curvature_numbers(layer: LayerSizes, samples: int) -> int:
        """Count the two Kronecker factors."""
        return layer.inputs**2 + layer.outputs**2


@Parameter(group="K-FAC")
@dataclass(frozen=True, kw_only=True)
class KfacSettings(BaselineSettings):
    """K-FAC (Martens and Grosse 2015): the block of a layer is a Kronecker product of two factors."""

    optimizer = KFAC
    lr: PositiveFloat = 0.003
    damping: PositiveFloat = 0.1
    weight_decay: NonNegativeFloat = 0.001


@Parameter(group="EKFAC")
@dataclass(frozen=True, kw_only=True)
class EkfacSettings(BaselineSettings):
    """EKFAC (George et al. 2018): K-FAC with rescaled eigenvalues."""

    optimizer = EKFAC
    lr: PositiveFloat = 0.001
    damping: PositiveFloat = 0.03
    rescale_every: PositiveInt = 20
    "Steps between two rescalings of the eigenvalues."
    weight_decay: NonNegativeFloat = 0.003

    @staticmethod
    @override
    def curvature_numbers(layer: LayerSizes, samples: int) -> int:
        """Count the two Kronecker factors, and an eigenvalue for each parameter."""
        return BaselineSettings.curvature_numbers(layer, samples) + layer.parameters


@Parameter(group="K-BFGS")
@dataclass(frozen=True, kw_only=True)
class KbfgsSettings(BaselineSettings):
    """K-BFGS (Goldfarb, Ren and Bahamou 2020): quasi-Newton updates of the inverses of the Kronecker factors."""

    needs_closure: ClassVar[bool] = True
    optimizer: ClassVar[Callable[..., torch.optim.Optimizer]] = KBFGS
    lr: PositiveFloat = 0.03
    damping: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 0.01


@Parameter(group="K-BFGS(L)")
@dataclass(frozen=True, kw_only=True)
class KbfgslSettings(KbfgsSettings):
    """K-BFGS(L): K-BFGS that keeps the last updates of an output factor's inverse instead of the inverse."""

    in_paper: ClassVar[bool] = False
    optimizer = KBFGSL
