"""Settings of the rivals: K-FAC and its kin from `tengrad_triton.baselines`, SOAP and Shampoo from pytorch-optimizer.

The defaults of K-FAC, EKFAC and K-BFGS are what the paper tuned for 3C1F on Fashion-MNIST (table 3).
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

BASELINES, PACKAGE = "tengrad_triton.baselines", "pytorch_optimizer"


@Parameter(group="K-FAC")
@dataclass(frozen=True, kw_only=True)
class KfacSettings:
    """K-FAC (Martens and Grosse 2015): a Kronecker product of two factors for each layer's block."""

    needs: ClassVar[str] = BASELINES
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.003
    "Learning rate."
    damping: PositiveFloat = 0.1
    "Damping of the factors."
    refresh_every: PositiveInt = 100
    "Steps between two captures of the curvature."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.001
    "Weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return K-FAC over all parameters."""
        from tengrad_triton.baselines import KFAC  # noqa: PLC0415

        return KFAC(model, **asdict(self))


@Parameter(group="EKFAC")
@dataclass(frozen=True, kw_only=True)
class EkfacSettings:
    """EKFAC (George et al. 2018): K-FAC with a rescaled eigenbasis."""

    needs: ClassVar[str] = BASELINES
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.001
    "Learning rate."
    damping: PositiveFloat = 0.03
    "What is added to the rescaled eigenvalues."
    refresh_every: PositiveInt = 100
    "Steps between two eigendecompositions."
    rescale_every: PositiveInt = 20
    "Steps between two rescalings of the eigenvalues."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.003
    "Weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return EKFAC over all parameters."""
        from tengrad_triton.baselines import EKFAC  # noqa: PLC0415

        return EKFAC(model, **asdict(self))


@Parameter(group="K-BFGS")
@dataclass(frozen=True, kw_only=True)
class KbfgsSettings:
    """K-BFGS (Goldfarb, Ren and Bahamou 2020): quasi-Newton updates of a Kronecker product's inverse factors."""

    needs: ClassVar[str] = BASELINES
    closure: ClassVar[bool] = True
    lr: PositiveFloat = 0.03
    "Learning rate."
    damping: PositiveFloat = 0.01
    "Damping of the quasi-Newton updates."
    refresh_every: PositiveInt = 100
    "Steps between two updates of the curvature."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.01
    "Weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return K-BFGS over all parameters."""
        from tengrad_triton.baselines import KBFGS  # noqa: PLC0415

        return KBFGS(model, **asdict(self))


@Parameter(group="K-BFGS(L)")
@dataclass(frozen=True, kw_only=True)
class KbfgslSettings(KbfgsSettings):
    """K-BFGS(L): K-BFGS whose inverse of the outputs' factor is kept as its last updates."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return K-BFGS(L) over all parameters."""
        from tengrad_triton.baselines import KBFGSL  # noqa: PLC0415

        return KBFGSL(model, **asdict(self))


@Parameter(group="SOAP")
@dataclass(frozen=True, kw_only=True)
class SoapSettings:
    """SOAP (Vyas et al. 2024), from the package pytorch-optimizer."""

    needs: ClassVar[str] = PACKAGE
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.003
    "Learning rate."
    betas: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Parameter(negative=())] = (0.95, 0.95)
    "Decay rates of the running means of the gradient and of its square."
    refresh_every: PositiveInt = 10
    "Steps between two changes of the eigenbasis."
    weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SOAP over all parameters."""
        import pytorch_optimizer  # noqa: PLC0415

        settings = asdict(self)
        every = settings.pop("refresh_every")
        return _built(pytorch_optimizer.SOAP, model, precondition_frequency=every, **settings)


@Parameter(group="Shampoo")
@dataclass(frozen=True, kw_only=True)
class ShampooSettings:
    """Shampoo (Gupta, Koren and Singer 2018), from the package pytorch-optimizer: a factor for each of a weight's axes.

    Not for layers with many thousands of inputs, whose factor's root takes minutes.
    """

    needs: ClassVar[str] = PACKAGE
    closure: ClassVar[bool] = False
    lr: PositiveFloat = 0.1
    "Learning rate; at a tenth of the default the digits' loss hardly moves."
    refresh_every: PositiveInt = 1
    "Steps between two computations of the factors' roots; parameters move from the first of them on."
    momentum: NonNegativeFloat = 0.9
    "Momentum."
    weight_decay: NonNegativeFloat = 0.01
    "Decoupled weight decay."

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return Shampoo over all parameters."""
        import pytorch_optimizer  # noqa: PLC0415

        settings = asdict(self)
        every = settings.pop("refresh_every")
        more = {"preconditioning_compute_steps": every, "weight_decouple": True}
        return _built(pytorch_optimizer.Shampoo, model, **more, **settings)


def _built(kind: Any, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **settings)
    return optimizer
