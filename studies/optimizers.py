"""The optimizers of the study: TENGraD with its defaults, AdamW and Muon with their own or a tuned learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton import TENGraD


class Combined(torch.optim.Optimizer):
    """Several optimizers as one, each with its own parameters."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})

    @override
    def step(self, closure: Any = None) -> None:
        """Take a step of each."""
        for part in self.parts:
            part.step(closure)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear layers but the first and the last, which Muon is meant for (Jordan 2024)."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [layer.weight for layer in layers[1:-1] if isinstance(layer, nn.Linear)]


def _tengrad(model: nn.Module, lr: float, likelihood: str, seed: int, **settings: Any) -> torch.optim.Optimizer:
    return TENGraD(model, lr=lr, likelihood=likelihood, seed=seed, **settings)


def _adamw(model: nn.Module, lr: float, likelihood: str, seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def _muon(model: nn.Module, lr: float, likelihood: str, seed: int) -> torch.optim.Optimizer:
    matrices = hidden_matrices(model)
    chosen = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return Combined(torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr))


def default_lr(kind: type[torch.optim.Optimizer]) -> float:
    """Return the default learning rate of an optimizer."""
    lr: float | Tensor = inspect.signature(kind).parameters["lr"].default
    return float(lr)


BUILDERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"tengrad": _tengrad, "adamw": _adamw, "muon": _muon}
DEFAULT_LR = {
    "tengrad": default_lr(TENGraD), "adamw": default_lr(torch.optim.AdamW), "muon": default_lr(torch.optim.Muon),
}  # fmt: skip
FACTORS = {"tengrad": (1 / 3, 1, 3), "adamw": (1, 3, 10), "muon": (1, 3, 10)}
"""Multiples of the default learning rate. All of TENGraD's must be safe; the best of the others' is the tuned one."""


def close(optimizer: torch.optim.Optimizer) -> None:
    """Remove TENGraD's hooks from its model; the other optimizers have none."""
    with suppress(AttributeError):
        optimizer.close()  # type: ignore[attr-defined]
