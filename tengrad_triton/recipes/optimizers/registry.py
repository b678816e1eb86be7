"""The optimizers by name. The order is that of reports, and gives each optimizer its colour in figures.

All else follows from an entry: the choices and flags of the command line, the fields of `training.settings.Settings`,
what `paper` trains, and the estimates of memory.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tengrad_triton.recipes.optimizers.baselines import EkfacSettings, KbfgslSettings, KbfgsSettings, KfacSettings
from tengrad_triton.recipes.optimizers.first_order import AdamwSettings, SgdSettings
from tengrad_triton.recipes.optimizers.muon import MuonSettings
from tengrad_triton.recipes.optimizers.settings import OptimizerName, OptimizerSettings
from tengrad_triton.recipes.optimizers.tengrad import TengradPaperSettings, TengradSettings, TengradUnscaledSettings
from tengrad_triton.recipes.optimizers.third_party import ShampooSettings, SoapSettings

OPTIMIZERS: dict[OptimizerName, type[OptimizerSettings]] = {
    "tengrad": TengradSettings,
    "tengrad_paper": TengradPaperSettings,
    "sgd": SgdSettings,
    "adamw": AdamwSettings,
    "tengrad_unscaled": TengradUnscaledSettings,
    "kfac": KfacSettings,
    "ekfac": EkfacSettings,
    "kbfgs": KbfgsSettings,
    "kbfgsl": KbfgslSettings,
    "muon": MuonSettings,
    "soap": SoapSettings,
    "shampoo": ShampooSettings,
}


def place(name: OptimizerName) -> int:
    """Return the place of an optimizer in reports; a name without an entry, as in older files, comes last."""
    return list(OPTIMIZERS).index(name) if name in OPTIMIZERS else len(OPTIMIZERS)


def flag(name: OptimizerName) -> str:
    """Return how the flags of an optimizer begin: --tengrad-paper for tengrad_paper."""
    return f"--{name.replace('_', '-')}"


def _with_underscores(_: object, tokens: Any) -> str:
    """Return the name that a word of the command line means: flags have hyphens where names have underscores."""
    word = getattr(tokens[0], "value", tokens[0])  # cyclopts before version 5 gives the text
    return str(word).replace("-", "_")


if TYPE_CHECKING:
    Choice = OptimizerName
else:  # the choices are known at run time only
    Choice = Annotated[Literal[tuple(OPTIMIZERS)], Parameter(converter=_with_underscores)]
