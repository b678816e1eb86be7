"""How α of a Gauss-Newton step is chosen: by a function of the step, the gain ratio or the effective dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from typing_extensions import override

from tengrad_triton.least_squares.systems import System
from tengrad_triton.optim.validation import check_number, is_number

_START = 0.05  # of the trace of J̃ᵀ J̃
_SHRINK, _GROW = 0.5, 4.0  # of what multiplies a given damping: after a step that was taken, and one that was not


@runtime_checkable
class AdaptiveDamping(Protocol):
    """A rule for α. ``state`` holds what it remembers, in the optimizer's parameter group."""

    def begin(self, state: dict[str, Any], step: int, system: System) -> None:
        """Set ``state["damping"]`` for the first attempt of a step.

        Args:
            state: of the rule.
            step: the number of steps before this one.
            system: of the step, for its eigenvalues, their sum, and the smallest α that they resolve.
        """

    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Adapt to a step that was taken; its loss fell by ``ratio`` times what the linear model predicted."""

    def reject(self, state: dict[str, Any]) -> None:
        """Raise ``state["damping"]`` after an attempt that was taken back."""

    def lower(self, state: dict[str, Any]) -> bool:
        """Lower ``state["damping"]`` where it hides the step; return whether that was possible."""


def _check_order(**numbers: float) -> None:
    """Raise unless numbers are positive, finite and increase in the order given."""
    for name, value in numbers.items():
        check_number(name, value)
    values = list(numbers.values())
    if not (values[0] > 0 and values[-1] < math.inf and values == sorted(values)):
        raise ValueError(f"expected 0 < {' <= '.join(numbers)}, got {', '.join(f'{v:g}' for v in values)}")


@dataclass(frozen=True)
class GainRatio:
    """α follows the gain ratio ρ, the loss's decrease over what the linear model predicted (Nielsen 1999, eq. 2.5).

    After a step that was taken, α is multiplied by max(decrease, 1 − (2ρ − 1)³). After an attempt that was taken back
    it is multiplied by ν, which begins at 2 and doubles from one attempt to the next.

    Args:
        start: the first α; by default a twentieth of the trace of the first J̃ᵀ J̃.
        decrease: the smallest multiplier after a step that was taken, in (0, 1].
        least: the smallest α, in units of the trace of J̃ᵀ J̃.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    start: float | None = None
    decrease: float = 1 / 3
    least: float = 1e-18

    def __post_init__(self) -> None:
        if self.start is not None:
            _check_order(start=self.start)
        _check_order(least=self.least)
        _check_order(decrease=self.decrease, one=1.0)

    def begin(self, state: dict[str, Any], step: int, system: System) -> None:
        """Begin with the damping that the last step left."""
        state.setdefault("growth", 2.0)
        state["usual"] = _START * system.trace
        if not state["damping"]:
            state["damping"] = state["usual"]
        state["least"] = max(self.least * system.trace, system.least_damping)
        state["damping"] = max(state["damping"], state["least"])

    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Multiply α by max(decrease, 1 − (2ρ − 1)³), where ρ counts in [0, 1]."""
        multiplier = max(self.decrease, 1 - (2 * min(max(ratio, 0.0), 1.0) - 1) ** 3)
        state["damping"] = max(state["least"], multiplier * state["damping"])
        state["growth"] = 2.0

    def reject(self, state: dict[str, Any]) -> None:
        """Multiply α by ν, and double ν."""
        state["damping"] *= state["growth"]
        state["growth"] *= 2

    def lower(self, state: dict[str, Any]) -> bool:
        """Fall to the usual first α, and from there by hundredths down to the least one."""
        before = state["damping"]
        state["damping"] = max(state["least"], min(state["usual"], 1e-2 * before))
        return bool(state["damping"] < before)


class Raised(AdaptiveDamping):
    """What is common to rules that find α anew at each step: attempts that were taken back have multiplied it."""

    @override
    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Undo half of what attempts that were taken back have raised."""
        state["raised"] = max(1.0, _SHRINK * state["raised"])

    @override
    def reject(self, state: dict[str, Any]) -> None:
        """Raise α fourfold."""
        state["raised"] *= _GROW
        state["damping"] *= _GROW

    @override
    def lower(self, state: dict[str, Any]) -> bool:
        """Take back what attempts have raised."""
        raised = state["raised"]
        state["damping"], state["raised"] = state["damping"] / raised, 1.0
        return bool(raised > 1)


@dataclass(frozen=True)
class EffectiveDimension(Raised):
    """α such that the effective dimension d(α) = Σ λ / (λ + α) is a share of the rank of J̃ᵀ J̃.

    Each step then has α by its own spectrum, which costs an eigenvalue decomposition (the effective dimension is that
    of Guzmán-Cordero et al. 2025, section 3.4). Attempts that are taken back raise it as they raise a given damping.

    Args:
        share: of the rank, in (0, 1).
        least: the smallest α.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    share: float = 0.5
    least: float = 1e-15

    def __post_init__(self) -> None:
        _check_order(share=self.share, one=1.0)
        _check_order(least=self.least)

    @override
    def begin(self, state: dict[str, Any], step: int, system: System) -> None:
        """Find α by bisection of its logarithm."""
        values = system.spectrum().double()
        values = values[values > len(values) * torch.finfo(torch.float64).eps * values.max()]
        wanted = self.share * max(1, len(values))
        low = math.log(max(self.least, system.least_damping))
        high = max(low, math.log(float(values.sum()) / wanted)) if len(values) else low  # d(α) ≤ Σ λ / α
        for _ in range(60):
            middle = (low + high) / 2
            dimension = float((values / (values + math.exp(middle))).sum())
            low, high = (middle, high) if dimension > wanted else (low, middle)
        state["damping"] = state.setdefault("raised", 1.0) * math.exp(high)


@dataclass(frozen=True)
class Exponential:
    """The function of the step max(least, start · factorᵏ): α after k steps, for ``damping``.

    Args:
        start: α of the first step.
        factor: from one step to the next, in (0, 1].
        least: the smallest α.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    start: float = 1.0
    factor: float = 0.9
    least: float = 1e-10

    def __post_init__(self) -> None:
        _check_order(least=self.least, start=self.start)
        _check_order(factor=self.factor, one=1.0)

    def __call__(self, step: int) -> float:
        """Return α after ``step`` steps."""
        return max(self.least, self.start * self.factor**step)


@dataclass(frozen=True)
class Given(Raised):
    """A constant or a function of the step, multiplied by what attempts that were taken back have raised."""

    schedule: Callable[[int], float]

    @override
    def begin(self, state: dict[str, Any], step: int, system: System) -> None:
        alpha = self.schedule(step)
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(f"damping must be positive and finite, but its function returned {alpha!r} at step {step}")
        if system.dtype == torch.float32 and alpha < system.least_damping:
            raise ValueError(
                f"damping {alpha:.1e} is below what float32 resolves beside J̃ᵀ J̃ of trace {system.trace:.1e} "
                f"({system.least_damping:.1e}): use model.double() and points.double(), or a larger damping"
            )
        state["damping"] = state.setdefault("raised", 1.0) * alpha


def damping_rule(damping: Any) -> tuple[AdaptiveDamping, float]:
    """Return the rule of a setting ``damping``, and the first α, 0 where the rule finds it.

    Raises:
        TypeError: it is no number, function or rule.
        ValueError: it is a number that is not positive.
    """
    if isinstance(damping, AdaptiveDamping) and not isinstance(damping, type):
        return damping, getattr(damping, "start", None) or 0.0
    if callable(damping) and not isinstance(damping, type):
        return Given(damping), 0.0
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        rules = "GainRatio(), EffectiveDimension()"
        raise TypeError(f"damping must be a number, a function of the step or one of {rules}, got {damping!r}")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive and finite, got {damping}")
    return Given(Exponential(damping, 1.0, damping)), float(damping)
