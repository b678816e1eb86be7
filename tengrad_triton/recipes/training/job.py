"""What all optimizers of a run share: the settings, the data and the device."""

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.settings import Settings


@dataclass(frozen=True)
class Job:
    """The settings of a run with its data, which are on the device."""

    settings: Settings
    data: Data
    device: torch.device

    def model(self) -> nn.Module:
        """Return the model with its first weights, which depend on the seed alone, on torch's default device."""
        torch.manual_seed(self.settings.seed)
        _, channels, height, width = self.data.train.images.shape
        model = image_model(self.settings.model)
        return model.build((channels, height, width), self.data.classes, self.settings.width)

    def build(self, name: OptimizerName) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model with its first weights on the job's device, and a new optimizer of it.

        Raises `ValueError` if the optimizer rejects a setting.
        """
        model = self.model().to(self.device)
        return model, self.settings.of(name).build(model)


def closing_hooks(optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
    """Return a context that removes the hooks of an optimizer from its model at the end, if it has any."""
    return closing(optimizer) if hasattr(optimizer, "close") else nullcontext()
