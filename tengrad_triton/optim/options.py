"""What an optimizer was told of its curvature, checked once: rows, blocks, representations and controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tengrad_triton.capture.blocks import BlocksChoice
from tengrad_triton.curvature.choices import REPRESENTATIONS, Backend, Representation
from tengrad_triton.likelihoods import FISHERS, Fisher, HasHessianFactor, Likelihood, likelihood_of
from tengrad_triton.tuning.plan import Plan
from tengrad_triton.tuning.plan_file import load

Unsupported = Literal["explicit", "sgd", "error"]
RepresentationChoice = Literal["auto"] | Representation | Mapping[str, Representation]
_WORDS = {"fisher": FISHERS, "unsupported": ("explicit", "sgd", "error"), "backend": ("auto", "torch")}


@dataclass(frozen=True)
class Options:
    """The settings of `TENGraD` that are not a parameter group's; what each means stands there.

    ``plan`` may be a file until `resolved`.
    """

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
    max_bytes: int
    tol: float
    trust_region: float | None
    relative_damping: bool

    @property
    def by_hand(self) -> Representation | Mapping[str, Representation] | None:
        """Return the representations that were given."""
        return None if self.representation == "auto" else self.representation


def checked(device: torch.device, *, likelihood: Any, plan: Plan | Path | str | None, **options: Any) -> Options:
    """Return the options.

    Raises:
        ValueError: a setting is out of range or unknown; the message says which, and what was expected.
        TypeError: a setting has the wrong type.
    """
    for name, allowed in _WORDS.items():
        if options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")
    for name in ("fisher_samples", "history", "fisher_rows"):
        check_count(name, options[name], optional=name == "fisher_rows")
    _check_blocks(options["blocks"])
    _check_representation(options["representation"])
    if not is_number(options["max_bytes"]) or options["max_bytes"] < 0:
        raise ValueError(f"max_bytes must be at least 0, got {options['max_bytes']!r}")
    if not is_number(options["tol"]) or not 0 < options["tol"] < 1:
        raise ValueError(f"tol must be in (0, 1), got {options['tol']!r}")
    region = options["trust_region"]
    if region is not None and not (is_number(region) and 0 < region < float("inf")):
        raise ValueError(f"trust_region must be positive, or None for no bound, got {region!r}")
    if not isinstance(options["relative_damping"], bool):
        raise TypeError(f"relative_damping must be True or False, got {options['relative_damping']!r}")
    chosen = likelihood_of(likelihood)
    check_rows(options["fisher"], chosen, options["fisher_samples"], options["history"], options["representation"])
    found = plan if isinstance(plan, Plan) else load(Path(plan), device) if plan is not None else Plan({})
    return Options(likelihood=chosen, plan=found, **options)


def check_count(name: str, value: Any, optional: bool = False) -> None:
    """Reject what is no number of things; None is one where it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_blocks(blocks: Any) -> None:
    if blocks in ("layer", "network"):
        return
    lists = isinstance(blocks, (list, tuple)) and all(
        isinstance(group, (list, tuple)) and group and all(isinstance(name, str) for name in group) for group in blocks
    )
    if not lists:
        raise ValueError(f"blocks must be 'layer', 'network' or lists of modules' names, got {blocks!r}")


def _check_representation(representation: Any) -> None:
    known = ("auto", *REPRESENTATIONS)
    for value in representation.values() if isinstance(representation, Mapping) else [representation]:
        if value not in known:
            raise ValueError(f"representation must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_rows(fisher: Fisher, likelihood: Likelihood, draws: int, history: int, representation: Any) -> None:
    """Reject rows that the likelihood cannot give, or that exclude each other."""
    if draws > 1 and fisher != "sampled":
        raise ValueError(f"fisher_samples={draws} draws labels, which fisher={fisher!r} does not: use fisher='sampled'")
    if fisher == "exact" and not isinstance(likelihood, HasHessianFactor):
        raise TypeError(
            f"fisher='exact' needs a likelihood with hessian_factor(output), the columns of its Hessian's factor; "
            f"{type(likelihood).__name__} has none: use fisher='sampled', or add it"
        )
    given = representation.values() if isinstance(representation, Mapping) else [representation]
    if history > 1 and "compressed" in given:
        raise ValueError(f"history={history} keeps rows, of which 'compressed' keeps none: choose one of the two")


def is_number(value: Any) -> bool:
    """Whether a setting is a number, which True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
