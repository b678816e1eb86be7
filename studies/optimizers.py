"""The optimizers of the study: TENGraD with its defaults, and its rivals with their published settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from studies.problems.base import LikelihoodName
from tengrad_triton import TENGraD
from tengrad_triton.likelihoods import Categorical, Likelihood
from tengrad_triton.recipes.optimizers.muon import MuonSettings
from tengrad_triton.recipes.optimizers.third_party import SoapSettings

OURS = "tengrad"


@dataclass(frozen=True)
class Rival:
    """An optimizer to compare with.

    Attributes:
        title: what it is and whose settings it has, for the page.
        lr: its default learning rate, the middle of the grid.
        settings: all other settings.
        build: returns it for a model, given ``lr`` and the settings.
    """

    title: str
    lr: float
    settings: Mapping[str, Any]
    build: Callable[..., torch.optim.Optimizer]


def _published(kind: type[MuonSettings] | type[SoapSettings]) -> dict[str, Any]:
    """Return the settings of a recipe, which are those that the optimizer was published with, except ``lr``."""
    settings = asdict(kind())
    del settings["lr"]
    return settings


RIVALS: dict[str, Rival] = {
    "sgd": Rival(
        "`torch.optim.SGD` with Nesterov momentum 0.9",
        0.1,
        {"momentum": 0.9, "nesterov": True},
        lambda model, **settings: torch.optim.SGD(model.parameters(), **settings),
    ),
    "adamw": Rival(
        "`torch.optim.AdamW`",
        1e-3,
        {"betas": (0.9, 0.999), "weight_decay": 0.01},
        lambda model, **settings: torch.optim.AdamW(model.parameters(), **settings),
    ),
    "muon": Rival(
        "`torch.optim.Muon` for the weights of hidden linear and convolution layers, with steps scaled to AdamW's "
        "(Liu et al. 2025), and AdamW for the rest",
        MuonSettings().lr,
        _published(MuonSettings),
        lambda model, **settings: MuonSettings(**settings).build(model),
    ),
    "soap": Rival(
        "SOAP (Vyas et al. 2024) of the package pytorch-optimizer",
        SoapSettings().lr,
        _published(SoapSettings),
        lambda model, **settings: SoapSettings(**settings).build(model),
    ),
}
NAMES = (OURS, *RIVALS)
WITHOUT_EFFECT = ("gram", "process_group", "include_curvature")
"""Settings that change no step of one process: results from before they were there are those of today."""
GIVEN = ("model", "params", "lr", "likelihood", "seed")  # what the study says to TENGraD; all else is a default


def defaults() -> dict[str, Any]:
    """Return TENGraD's defaults, except the learning rate and what is said for each problem."""
    known = inspect.signature(TENGraD).parameters
    left_out = {*GIVEN, *WITHOUT_EFFECT}
    return {name: parameter.default for name, parameter in known.items() if name not in left_out}


def default_lr(name: str) -> float:
    """Return the learning rate whose multiples an optimizer is tried with."""
    return RIVALS[name].lr if name in RIVALS else float(inspect.signature(TENGraD).parameters["lr"].default)


def settings_of(name: str, change: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of an optimizer except the learning rate, with some of them changed."""
    return {**(RIVALS[name].settings if name in RIVALS else defaults()), **change}


def build(
    name: str, model: nn.Module, lr: float, likelihood: LikelihoodName, seed: int, change: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return an optimizer of a model; only TENGraD needs the likelihood, and the seed of the labels that it draws."""
    if name in RIVALS:
        return RIVALS[name].build(model, lr=lr, **settings_of(name, change))
    said: str | Likelihood = Categorical(dim=1) if likelihood == "tokens" else likelihood
    return TENGraD(model, lr=lr, likelihood=said, seed=seed, **change)


def close(optimizer: torch.optim.Optimizer) -> None:
    """Remove TENGraD's hooks from its model; the other optimizers have none."""
    with suppress(AttributeError):
        optimizer.close()  # type: ignore[attr-defined]
