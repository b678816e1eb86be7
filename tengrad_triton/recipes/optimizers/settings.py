"""What the settings of every optimizer have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

OptimizerName = str  # a key of `registry.OPTIMIZERS`


@dataclass(frozen=True)
class LayerSizes:
    """The I, O and P of a layer, as in docs/math.md, and its number of parameters."""

    inputs: int
    outputs: int
    positions: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(ABC):
    """The settings of one optimizer. A subclass has a field for each, which the command line has as a flag.

    Attributes:
        package: the package that has to be installed.
        needs_closure: whether a step takes a closure, because it evaluates the loss itself.
        in_paper: whether `tengrad-triton paper` trains it if nobody names optimizers.
    """

    package: ClassVar[str] = "torch"
    needs_closure: ClassVar[bool] = False
    in_paper: ClassVar[bool] = True

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of all parameters; raises `ValueError` if the optimizer rejects a setting."""

    @property
    def interval(self) -> int | None:
        """The steps between two refreshes of the curvature; None if there are no refreshes or the interval varies."""
        return getattr(self, "refresh_every", None)

    def refreshes(self, steps: int) -> Sequence[int]:
        """Return which of the first steps, counted from 0, refresh the curvature."""
        return range(0, steps, self.interval) if self.interval else ()

    def changed(self, **values: Any) -> Self:
        """Return the settings with other values for those fields among ``values`` that this optimizer has."""
        names = {field.name for field in fields(self)}
        return replace(self, **{name: value for name, value in values.items() if name in names})

    @staticmethod
    def curvature_numbers(layer: LayerSizes, samples: int) -> int:
        """Return how many numbers the curvature of a layer takes at least; by default none."""
        del layer, samples
        return 0
