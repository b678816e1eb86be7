"""The optimizers of the recipes: one frozen dataclass of settings each, which builds it.

The defaults of tengrad, sgd and adamw suit the default run: of a grid for each, what had the best accuracy after 15
epochs on the last fifth of the digits' training set, as a mean over six seeds. The rivals' (`rivals.py`, `muon.py`) are
those of their own papers and packages. Other data need their own.

A new optimizer is a dataclass here or there, its name in `OptimizerName` and a field of `Settings`.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt, ResolvedExistingFile
from torch import nn

from tengrad_triton.curvature.choices import Representation
from tengrad_triton.likelihoods import Fisher

OptimizerName = Literal[
    "tengrad", "sgd", "adamw", "tengrad_defaults", "kfac", "ekfac", "kbfgs", "kbfgsl", "muon", "soap", "shampoo"
]


class OptimizerSettings(Protocol):
    """What every optimizer's settings can do.

    Attributes:
        needs: the package that has to be installed.
        closure: whether a step evaluates the loss by itself, and takes a function for that.
    """

    needs: ClassVar[str]
    closure: ClassVar[bool]

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters; raises `ValueError` on settings that it cannot take."""


@Parameter(group="TENGraD")
@dataclass(frozen=True, kw_only=True)
class TengradSettings:
    """TENGraD: exact natural-gradient steps, layer by layer."""

    needs: ClassVar[str] = "torch"
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.005
    "Learning rate."
    damping: PositiveFloat = 0.1
    "What is added to the Fisher matrix's diagonal before it is inverted."
    refresh_every: PositiveInt = 100
    "Steps between two captures of the curvature, which the steps in between reuse."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."
    fisher: Fisher = "sampled"
    "Whose labels the Fisher matrix uses: drawn from the model, the data's own, or all of them."
    representation: Literal["auto"] | Representation = "auto"
    "How a layer's curvature is stored."
    plan: ResolvedExistingFile | None = None
    "Plan file of tengrad-triton autotune; the analytic rule chooses if not given."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return TENGraD over all parameters."""
        from tengrad_triton.optim.tengrad import TENGraD  # noqa: PLC0415

        return TENGraD.paper(
            model,
            lr=self.lr,
            damping=self.damping,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            refresh_every=self.refresh_every,
            fisher=self.fisher,
            representation=self.representation,
            plan=self.plan,
        )


@Parameter(group="TENGraD, by its defaults")
@dataclass(frozen=True, kw_only=True)
class TengradDefaultsSettings:
    """TENGraD with the library's defaults: relative damping, a trust region, look-ahead, refreshes that grow rarer."""

    needs: ClassVar[str] = "torch"
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.03
    "Learning rate."
    damping: PositiveFloat = 0.003
    "Damping, relative to each block's trace."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.0
    "Weight decay."
    trust_region: PositiveFloat = 3e-4
    "Bound of a step's squared Fisher norm."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return TENGraD over all parameters."""
        from tengrad_triton.optim.tengrad import TENGraD  # noqa: PLC0415

        return TENGraD(model, **asdict(self))


@Parameter(group="SGD")
@dataclass(frozen=True, kw_only=True)
class SgdSettings:
    """torch's SGD with momentum."""

    needs: ClassVar[str] = "torch"
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.05
    "Learning rate."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD over all parameters."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@Parameter(group="AdamW")
@dataclass(frozen=True, kw_only=True)
class AdamwSettings:
    """torch's AdamW."""

    needs: ClassVar[str] = "torch"
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.01
    "Learning rate."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.9, 0.999)
    "Decay rates of the running means of the gradient and of its square."
    weight_decay: NonNegativeFloat = 0.1
    "Decoupled weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
