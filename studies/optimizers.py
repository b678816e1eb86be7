"""Who takes part: TENGraD as it comes, AdamW and Muon with their own defaults or a tuned learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton import TENGraD


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each with its own parameters."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})

    def step(self, closure: Any = None) -> None:
        """Let each take its step."""
        for part in self.parts:
            part.step(closure)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return what Muon is for (Jordan 2024): the matrices of linear layers, but for the first and the last layer."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [layer.weight for layer in layers[1:-1] if isinstance(layer, nn.Linear)]


def _tengrad(model: nn.Module, lr: float, likelihood: str, seed: int, **settings: Any) -> torch.optim.Optimizer:
    return TENGraD(model, lr=lr, likelihood=likelihood, seed=seed, **settings)


def _adamw(model: nn.Module, lr: float, likelihood: str, seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def _muon(model: nn.Module, lr: float, likelihood: str, seed: int) -> torch.optim.Optimizer:
    matrices = hidden_matrices(model)
    theirs = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in theirs]
    return Together(torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr))


def default_lr(kind: type[torch.optim.Optimizer]) -> float:
    """Return the learning rate that an optimizer has by default."""
    lr: float | Tensor = inspect.signature(kind).parameters["lr"].default
    return float(lr)


BUILDERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"tengrad": _tengrad, "adamw": _adamw, "muon": _muon}
DEFAULT_LR = {
    "tengrad": default_lr(TENGraD), "adamw": default_lr(torch.optim.AdamW), "muon": default_lr(torch.optim.Muon),
}  # fmt: skip
FACTORS = {"tengrad": (1 / 3, 1, 3), "adamw": (1, 3, 10), "muon": (1, 3, 10)}
"""The learning rates that are tried, over the default: TENGraD's must all be safe, of the rivals' the best is taken."""


def close(optimizer: torch.optim.Optimizer) -> None:
    """Take TENGraD's hooks off its model; the others have none."""
    with suppress(AttributeError):
        optimizer.close()  # type: ignore[attr-defined]
