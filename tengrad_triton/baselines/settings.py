"""The settings that several baselines have: their types, defaults, documentation and validation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import indent
from typing import Any, Final, TypedDict, TypeVar

from tengrad_triton.likelihoods import FISHERS, Fisher, Likelihood, likelihood_of
from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.optim.damping import Schedule
from tengrad_triton.optim.options import Unsupported, check_fisher
from tengrad_triton.optim.validation import arguments_of, check_bound, check_choice, check_count, check_range

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
    ``momentum``, ``nesterov``, ``weight_decay``, ``decoupled_weight_decay`` and ``maximize``. A layer's parameters may
    be in different groups, which then need one ``damping``.
lr: the learning rate, a number or a 0-dim tensor.
"""
_COMMON = f"""
momentum: the momentum μ, in [0, 1); {DEFAULTS["momentum"]} by default.
nesterov: whether to look ahead along the momentum; {DEFAULTS["nesterov"]} by default.
weight_decay: λ ≥ 0, added to the preconditioned gradient as λ θ; {DEFAULTS["weight_decay"]:g} by default.
decoupled_weight_decay: whether to multiply θ by 1 − lr λ instead; {DEFAULTS["decoupled_weight_decay"]} by default.
maximize: whether to maximize the loss instead of minimizing it; {DEFAULTS["maximize"]} by default.
unsupported: how parameters without Kronecker factors are treated: ``"sgd"`` (the default) gives them the SGD
    step, with one warning; ``"error"`` raises `ValueError`, at construction or at the first refresh.
seed: the seed of the generator that draws labels; torch's initial seed by default.
"""
_FACTORS = """
factors_every: every how many steps a batch is added to the running factors; by default None, which adds one at each
    refresh only.
stat_decay: the decay of the running factors, in [0, 1): the weight of their old value when a batch is added; 0.95 by
    default. At the k-th batch the weight is at most 1 − 1/k, so that the first batches have equal weight.
kl_clip: κ > 0, in units of the loss, a bound on Σ lr² ⟨d, ∇L⟩ with the preconditioned gradients d. If the sum would
    exceed it, all d are multiplied by the same number below 1. 1e-3 by default, None for no bound.
fisher: ``"sampled"`` (the default), ``"exact"`` or ``"empirical"``, as in `TENGraD`.
likelihood: ``"categorical"`` (the default), ``"gaussian"``, ``"bernoulli"`` or an object, as in `TENGraD`.
fisher_samples: the number of labels drawn for each sample; 1 by default.
"""
_RAISES = """
Raises:
    ValueError: a setting is out of range or unknown; the message says which, and what was expected.
    TypeError: a setting has the wrong type, or is unknown.
"""
_SHARED = {"{model}": _MODEL, "{common}": _COMMON, "{factors}": _FACTORS}


def document(cls: T) -> T:
    """Replace `{model}`, `{common}` and `{factors}` in a class's docstring by the texts of the common arguments."""
    if cls.__doc__ is not None:  # python -OO drops docstrings
        text = inspect.cleandoc(cls.__doc__)
        for placeholder, arguments in _SHARED.items():
            text = text.replace(f"    {placeholder}", indent(arguments.strip(), "    "))
        cls.__doc__ = f"{text}\n{_RAISES}"
    return cls


def with_defaults(optimizer: type, common: Common) -> dict[str, Any]:
    """Return all common settings of a baseline: the given ones, and defaults for the others.

    Args:
        optimizer: the baseline's class, for the error message.
        common: the given settings.

    Raises:
        TypeError: a setting is unknown.
        ValueError: ``unsupported`` is unknown.
    """
    unknown = sorted(common.keys() - DEFAULTS.keys())
    if unknown:
        known = list(dict.fromkeys(["lr", *arguments_of(optimizer), *DEFAULTS]))
        named = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise TypeError(f"{optimizer.__name__} has no argument {named}: it takes {', '.join(known)}")
    settings = {**DEFAULTS, **common}
    check_choice("unsupported", settings["unsupported"], ("sgd", "error"))
    return settings


@dataclass(frozen=True)
class FisherOptions:
    """Which derivatives the factors are computed from; the docstring of `TENGraD` explains the choices.

    Attributes:
        fisher: the kind of the Fisher matrix.
        likelihood: the distribution from which labels are drawn.
        fisher_samples: the number of labels drawn for each sample.
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
    check_choice("fisher", fisher, FISHERS)
    options = FisherOptions(fisher, likelihood_of(likelihood), fisher_samples)
    check_fisher(options.fisher, options.likelihood, options.fisher_samples)
    return options


def check_running_factors(factors_every: Any, stat_decay: Any, kl_clip: Any) -> None:
    """Raise unless the settings of running factors, and of the bound on a step, are valid."""
    check_count("factors_every", factors_every, optional=True)
    check_range("stat_decay", stat_decay, 0.0, below=1.0)
    check_bound("kl_clip", kl_clip)
