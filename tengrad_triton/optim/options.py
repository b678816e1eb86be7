"""The settings of `TENGraD` that do not belong to a parameter group, validated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tengrad_triton.capture.blocks import BlocksChoice
from tengrad_triton.capture.outputs import Select
from tengrad_triton.capture.rows.attribution import Verify
from tengrad_triton.curvature.choices import REPRESENTATIONS, Backend, Choice, Representation
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.curvature.moments import Scaling
from tengrad_triton.curvature.refresh import RefreshOptions
from tengrad_triton.distributed.ranks import GRAMS, Gram, settings_of_groups
from tengrad_triton.likelihoods import FISHERS, Fisher, HasHessianFactor, Likelihood, likelihood_of
from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.validation import check_bool, check_bound, check_choice, check_count, check_number
from tengrad_triton.tuning.budget import Budget, Spender
from tengrad_triton.tuning.plan import Given, Plan
from tengrad_triton.tuning.plan_file import load
from tengrad_triton.tuning.precision import within_damping

Unsupported = Literal["explicit", "sgd", "error"]
RepresentationChoice = Literal["auto"] | Representation | Mapping[str, Representation]
PAPER: Mapping[str, Any] = {
    "lr": 3e-3, "damping": 0.1, "relative_damping": False, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-3,
    "refresh_every": 100, "fisher": "sampled", "history": 1, "trust_region": None, "scaling": "none",
}  # fmt: skip
"""The paper's settings for 3C1F on Fashion-MNIST (appendix, table 6)."""
UNSCALED: Mapping[str, Any] = {
    "lr": 3e-2, "damping": 3e-3, "relative_damping": True, "scaling": "none", "trust_region": 3e-4,
    "refresh_every": Growing(10),
}  # fmt: skip
"""Settings of F + α I that train the models of docs/defaults.md in the half that chooses."""
_ALLOWED = {
    "fisher": FISHERS,
    "unsupported": ("explicit", "sgd", "error"),
    "backend": ("auto", "torch"),
    "verify": ("change", "always", "never"),
    "scaling": ("none", "diagonal", "kronecker"),
    "gram": GRAMS,
}


@dataclass(frozen=True)
class Options:
    """The settings of `TENGraD` that do not belong to a parameter group; its docstring explains each of them."""

    fisher: Fisher
    likelihood: Likelihood
    fisher_samples: int
    fisher_rows: int | None
    history: int
    blocks: BlocksChoice
    representation: RepresentationChoice
    unsupported: Unsupported
    backend: Backend
    plan: Plan
    step_share: float | None
    max_bytes: int
    tol: float
    trust_region: float | None
    relative_damping: bool
    scaling: Scaling
    clip_threshold: float | None
    output: Select
    verify: Verify
    gram: Gram

    @property
    def given(self) -> Given:
        """The representations that the user chose."""
        return None if self.representation == "auto" else self.representation

    @property
    def budget(self) -> Budget:
        """What the optimizer may spend."""
        return Budget(self.step_share, self.max_bytes, self.fisher_rows)

    def spender(self, refresh_every: int, samples: int, foresee: Callable[..., None]) -> Spender:
        """Return what answers how many rows a refresh of a batch of ``samples`` keeps; ``foresee`` is told of it."""
        draws = self.fisher != "empirical"
        return Spender(self.budget, self.plan, self.given, refresh_every, samples, self.history, draws, foresee)

    def of_refresh(self, spend: Spender, refresh_every: int, damping: float, **others: Any) -> RefreshOptions:
        """Return the settings of a refresh; ``others`` are those that do not follow from these options.

        Arguments: as for `choose`; ``spend`` is from `spender`.
        """
        choose = partial(self.choose, refresh_every=refresh_every, damping=damping)
        return RefreshOptions(
            spend=spend, side_share=self.budget.side_share, history=self.history, tol=self.tol,
            relative_damping=self.relative_damping, scaling=self.scaling, choose=choose, **others,
        )  # fmt: skip

    def choose(self, geometries: Mapping[str, Geometry], refresh_every: int, damping: float) -> dict[str, Choice]:
        """Return every weight's choice: by the user if given, else by the plan, else by the cost model.

        ``damping`` is the least one of all weights.
        """
        choices = self.plan.choose(geometries, self.given, refresh_every, self.max_bytes)
        choices = within_damping(choices, damping, self.relative_damping)
        if self.history == 1:
            return choices
        # A plan may choose a compressed J, which has lost the rows that a history needs.
        return {
            name: Choice("per_sample", ()) if c.representation == "compressed" else c for name, c in choices.items()
        }


def settings_of(options: Options, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what has to be the same in all processes that train a model: not what depends on the device."""
    own = {name: value for name, value in vars(options).items() if name not in ("plan", "backend")}
    return own | settings_of_groups(optimizer.param_groups)


def validate(
    model: nn.Module, device: torch.device, *, likelihood: Any, plan: Plan | Path | str | None, **options: Any
) -> Options:
    """Return the options, with the likelihood and the plan as objects.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """
    for name, allowed in _ALLOWED.items():
        check_choice(name, options[name], allowed)
    for name in ("fisher_samples", "history", "fisher_rows"):
        check_count(name, options[name], optional=name == "fisher_rows")
    _check_blocks(options["blocks"])
    _check_representation(options["representation"], model)
    check_bound("step_share", options["step_share"])
    for name in ("max_bytes", "tol"):
        check_number(name, options[name])
    if not options["max_bytes"] >= 0:  # NaN is not
        raise ValueError(f"max_bytes must be at least 0, got {options['max_bytes']!r}")
    if not 0 < options["tol"] < 1:
        raise ValueError(f"tol must be in (0, 1), got {options['tol']!r}")
    for name in ("trust_region", "clip_threshold"):
        check_bound(name, options[name])
    check_bool("relative_damping", options["relative_damping"])
    chosen = likelihood_of(likelihood)
    check_fisher(options["fisher"], chosen, options["fisher_samples"])
    _check_history(options["history"], options["representation"])
    return Options(likelihood=chosen, plan=_plan_of(plan, device), **options)


def _plan_of(plan: Any, device: torch.device) -> Plan:
    if plan is None or isinstance(plan, Plan):
        return plan or Plan({})
    if not isinstance(plan, (str, Path)):
        raise TypeError(f"plan must be what autotune() returned, the path of its file, or None, got {plan!r}")
    return load(Path(plan), device)


def check_fisher(fisher: Fisher, likelihood: Likelihood, fisher_samples: int) -> None:
    """Raise unless the likelihood supports ``fisher``, with ``fisher_samples`` draws for each sample."""
    if fisher_samples > 1 and fisher != "sampled":
        raise ValueError(
            f"fisher_samples={fisher_samples} draws labels, but fisher={fisher!r} draws none: use fisher='sampled'"
        )
    if fisher == "exact" and not isinstance(likelihood, HasHessianFactor):
        raise TypeError(
            "fisher='exact' needs a likelihood with hessian_factor(output), the columns of a factor of its Hessian; "
            f"{type(likelihood).__name__} has none: use fisher='sampled', or add that method"
        )


def check_scaling(saved: str, own: str) -> None:
    """Raise ValueError unless a state was saved with this scaling: its rows and momenta mean something else."""
    if saved != own:
        raise ValueError(
            f"the state was saved with scaling={saved!r}, but this optimizer has scaling={own!r}: make it with "
            f"scaling={saved!r}"
        )


def _check_history(history: int, representation: Any) -> None:
    given = representation.values() if isinstance(representation, Mapping) else [representation]
    if history > 1 and "compressed" in given:
        raise ValueError(f"history={history} needs older rows, which 'compressed' drops: choose one of the two")


def _check_blocks(blocks: Any) -> None:
    if blocks in ("layer", "network"):
        return
    if isinstance(blocks, (list, tuple)) and not blocks:
        raise ValueError("blocks has no list: use 'layer' for a block of each layer, or lists of modules' names")
    lists = isinstance(blocks, (list, tuple)) and all(
        isinstance(group, (list, tuple)) and group and all(isinstance(name, str) for name in group) for group in blocks
    )
    if not lists:
        raise ValueError(f"blocks must be 'layer', 'network' or lists of modules' names, got {blocks!r}")


def _check_representation(representation: Any, model: nn.Module) -> None:
    if not isinstance(representation, Mapping):
        check_choice("representation", representation, ("auto", *REPRESENTATIONS))
        return
    names = [name for name, _ in getattr(model, "_orig_mod", model).named_parameters()]
    for name, value in representation.items():
        check_choice(f"representation of {name!r}", value, REPRESENTATIONS)
        if name not in names:
            raise ValueError(
                f"representation has the key {name!r}, but the model has no such parameter{did_you_mean(name, names)}: "
                "use names of model.named_parameters()"
            )
