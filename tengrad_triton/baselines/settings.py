"""The settings that all baselines share: their types, their defaults, their documentation and their validation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import indent
from typing import Any, Final, TypedDict, TypeVar

from tengrad_triton.likelihoods import FISHERS, Fisher, Likelihood, likelihood_of
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported, check_fisher
from tengrad_triton.optim.validation import check_bound, check_count, check_range

T = TypeVar("T", bound=type)


class Common(TypedDict, total=False):
    """The keyword arguments that every baseline takes."""

    damping: float | Schedule
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    unsupported: Unsupported
    seed: int | None


class FactorSettings(Common, total=False):
    """The keyword arguments that `KFAC` and `EKFAC` take."""

    refresh_every: int | Callable[[int], int]
    factors_every: int | None
    stat_decay: float
    kl_clip: float | None
    fisher: Fisher
    likelihood: str | Likelihood
    fisher_samples: int


class QuasiNewtonSettings(Common, total=False):
    """The keyword arguments that `KBFGS` and `KBFGSL` take."""

    refresh_every: int | Callable[[int], int]
    stat_decay: float


DEFAULTS: Final[Common] = {
    "damping": 0.03, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "decoupled_weight_decay": False,
    "maximize": False, "unsupported": "sgd", "seed": None,
}  # fmt: skip

_MODEL = """
model: the module that the training loop calls, wrapped in `torch.compile` or not. Samples are the first dimension
    of its inputs and its output.
params: parameters or groups of them; all of the model's by default. Groups may have their own ``lr``, ``damping``,
    ``momentum``, ``nesterov``, ``weight_decay``, ``decoupled_weight_decay`` and ``maximize``; a layer's parameters
    must share a group.
lr: the learning rate, a number or a 0-dim tensor.
"""
_COMMON = f"""
momentum: of the momentum buffer, in [0, 1); {DEFAULTS["momentum"]} by default.
nesterov: whether to look ahead along the momentum; {DEFAULTS["nesterov"]} by default.
weight_decay: λ ≥ 0, added to the preconditioned gradient as λ θ; {DEFAULTS["weight_decay"]:g} by default.
decoupled_weight_decay: shrink θ by 1 − lr λ instead; {DEFAULTS["decoupled_weight_decay"]} by default.
maximize: ascend; {DEFAULTS["maximize"]} by default.
unsupported: what happens to parameters without Kronecker factors: ``"sgd"`` (the default) gives them the plain SGD
    step, with one warning; ``"error"`` raises `ValueError`, at construction or at the first refresh.
seed: of the generator that draws labels, where any are drawn; torch's initial seed by default.
"""
_FACTORS = """
factors_every: steps from one batch that the running factors take in to the next; None for those of
    ``refresh_every`` (the default).
stat_decay: the share of their past that the running factors keep when they take in a batch, in [0, 1); 0.95 by
    default. When they take in the k-th batch it is 1 − 1/k at most, so that the first batches count alike.
kl_clip: κ > 0, in units of the loss: all preconditioned gradients d are scaled down by one factor where
    Σ lr² ⟨d, ∇L⟩ would exceed it; 1e-3 by default, None for no bound.
fisher: ``"sampled"`` (the default), ``"exact"`` or ``"empirical"``, as in `TENGraD`.
likelihood: ``"categorical"`` (the default), ``"gaussian"``, ``"bernoulli"`` or an object, as in `TENGraD`.
fisher_samples: labels drawn for each sample; 1 by default.
"""
_RAISES = """
Raises:
    ValueError: a setting is out of range or unknown; the message says which, and what was expected.
    TypeError: a setting has the wrong type, or there is no such setting.
"""
_SHARED = {"{model}": _MODEL, "{common}": _COMMON, "{factors}": _FACTORS}


def document(cls: T) -> T:
    """Complete a class's docstring: `{model}`, `{common}` and `{factors}` become the arguments that classes share."""
    if cls.__doc__ is not None:  # python -OO drops docstrings
        text = inspect.cleandoc(cls.__doc__)
        for placeholder, arguments in _SHARED.items():
            text = text.replace(f"    {placeholder}", indent(arguments.strip(), "    "))
        cls.__doc__ = f"{text}\n{_RAISES}"
    return cls


def with_defaults(optimizer: str, common: Common) -> dict[str, Any]:
    """Return all common settings of a baseline, those that are given and defaults for the rest.

    Args:
        optimizer: the name of its class, for the error message.
        common: those that are given.

    Raises:
        TypeError: there is no such setting.
        ValueError: ``unsupported`` is unknown.
    """
    unknown = sorted(common.keys() - DEFAULTS.keys())
    if unknown:
        raise TypeError(
            f"{optimizer} has no argument {', '.join(map(repr, unknown))}; besides its own it takes "
            f"{', '.join(DEFAULTS)}"
        )
    settings = {**DEFAULTS, **common}
    _check_choice("unsupported", settings["unsupported"], ("sgd", "error"))
    return settings


@dataclass(frozen=True)
class FisherOptions:
    """Which derivatives the factors are made of; `TENGraD` says what each choice means.

    Attributes:
        fisher: the kind of the Fisher matrix.
        likelihood: from which labels are drawn.
        fisher_samples: how many labels are drawn for each sample.
    """

    fisher: Fisher
    likelihood: Likelihood
    fisher_samples: int


def fisher_options(fisher: Fisher, likelihood: str | Likelihood, fisher_samples: int) -> FisherOptions:
    """Return valid options, with the likelihood as an object.

    Raises:
        ValueError: one is out of range or unknown, or they contradict each other.
        TypeError: one has the wrong type, or the likelihood lacks what ``fisher`` needs.
    """
    check_count("fisher_samples", fisher_samples)
    _check_choice("fisher", fisher, FISHERS)
    options = FisherOptions(fisher, likelihood_of(likelihood), fisher_samples)
    check_fisher(options.fisher, options.likelihood, options.fisher_samples)
    return options


def check_running_factors(factors_every: Any, stat_decay: Any, kl_clip: Any) -> None:
    """Raise unless the settings of running factors, and of the bound on a step, are valid."""
    check_count("factors_every", factors_every, optional=True)
    check_range("stat_decay", stat_decay, 0.0, below=1.0)
    check_bound("kl_clip", kl_clip)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
