"""What the settings of every optimizer have in common."""

from typing import ClassVar, Literal, Protocol

import torch
from torch import nn

OptimizerName = Literal[
    "tengrad",
    "sgd",
    "adamw",
    "tengrad_defaults",
    "tengrad_unscaled",
    "kfac",
    "ekfac",
    "kbfgs",
    "kbfgsl",
    "muon",
    "soap",
    "shampoo",
]


class OptimizerSettings(Protocol):
    """The settings of one optimizer.

    Attributes:
        package: the package that has to be installed.
        needs_closure: whether a step takes a closure, because it evaluates the loss itself.
    """

    package: ClassVar[str]
    needs_closure: ClassVar[bool]

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters; raises `ValueError` if the optimizer rejects a setting."""
