"""How α of a Gauss-Newton step is chosen: by a function of the step, the gain ratio or the effective dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import override

from tengrad_triton.optim.validation import check_number, is_number

_SHRINK, _GROW = 0.5, 4.0  # of what multiplies a given damping: after a step that was taken, and one that was not
MOST = 1e12


@runtime_checkable
class AdaptiveDamping(Protocol):
    """A rule for α. ``state`` holds what it remembers, in the optimizer's parameter group."""

    def begin(self, state: dict[str, Any], step: int, spectrum: Callable[[], Tensor], least: float) -> None:
        """Set ``state["damping"]`` for the first attempt of a step.

        Args:
            state: of the rule.
            step: the number of steps before this one.
            spectrum: returns the eigenvalues of J̃ᵀ J̃.
            least: the smallest α that the type of the parameters resolves.
        """

    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Adapt to a step that was taken; its loss fell by ``ratio`` times what the linear model predicted."""

    def reject(self, state: dict[str, Any]) -> None:
        """Raise ``state["damping"]`` after an attempt that was taken back."""


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
        start: the first α.
        decrease: the smallest multiplier after a step that was taken, in (0, 1].
        least: the smallest α.
        most: the largest α.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    start: float = 1.0
    decrease: float = 1 / 3
    least: float = 1e-15
    most: float = MOST

    def __post_init__(self) -> None:
        _check_order(least=self.least, start=self.start, most=self.most)
        _check_order(decrease=self.decrease, one=1.0)

    def begin(self, state: dict[str, Any], step: int, spectrum: Callable[[], Tensor], least: float) -> None:
        """Begin with the damping that the last step left."""
        state.setdefault("growth", 2.0)
        state["damping"] = max(state["damping"], least)

    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Multiply α by max(decrease, 1 − (2ρ − 1)³), where ρ counts in [0, 1]."""
        multiplier = max(self.decrease, 1 - (2 * min(max(ratio, 0.0), 1.0) - 1) ** 3)
        state["damping"] = min(self.most, max(self.least, multiplier * state["damping"]))
        state["growth"] = 2.0

    def reject(self, state: dict[str, Any]) -> None:
        """Multiply α by ν, and double ν."""
        state["damping"] = min(self.most, state["growth"] * state["damping"])
        state["growth"] *= 2


@dataclass(frozen=True)
class EffectiveDimension:
    """α such that the effective dimension d(α) = Σ λ / (λ + α) is a share of the number of eigenvalues λ of J̃ᵀ J̃.

    Each step then has α by its own spectrum, which costs an eigenvalue decomposition (the effective dimension is that
    of Guzmán-Cordero et al. 2025, section 3.4). Attempts that are taken back raise it as they raise a given damping.

    Args:
        share: of min(R, K), in (0, 1).
        least: the smallest α.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    share: float = 0.5
    least: float = 1e-15

    def __post_init__(self) -> None:
        _check_order(share=self.share, one=1.0)
        _check_order(least=self.least, most=MOST)

    def begin(self, state: dict[str, Any], step: int, spectrum: Callable[[], Tensor], least: float) -> None:
        """Find α by bisection of its logarithm."""
        values = spectrum().double()
        low, high, wanted = math.log(max(self.least, least)), math.log(MOST), self.share * len(values)
        for _ in range(60):
            middle = (low + high) / 2
            dimension = float((values / (values + math.exp(middle))).sum())
            low, high = (middle, high) if dimension > wanted else (low, middle)
        state["damping"] = state.setdefault("raised", 1.0) * math.exp(high)

    def accept(self, state: dict[str, Any], ratio: float) -> None:
        """Undo half of what attempts that were taken back have raised."""
        _lower(state)

    def reject(self, state: dict[str, Any]) -> None:
        """Raise α fourfold."""
        _raise(state)


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
class Given(AdaptiveDamping):
    """A constant or a function of the step, multiplied by what attempts that were taken back have raised."""

    schedule: Callable[[int], float]

    @override
    def begin(self, state: dict[str, Any], step: int, spectrum: Callable[[], Tensor], least: float) -> None:
        alpha = self.schedule(step)
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(f"damping must be positive and finite, but its function returned {alpha!r} at step {step}")
        if alpha < least:
            raise ValueError(
                f"damping {alpha:.1e} is below what float32 resolves ({least:.1e}): use model.double() and "
                "points.double(), or a larger damping"
            )
        state["damping"] = state.setdefault("raised", 1.0) * alpha

    @override
    def accept(self, state: dict[str, Any], ratio: float) -> None:
        _lower(state)

    @override
    def reject(self, state: dict[str, Any]) -> None:
        _raise(state)


def _lower(state: dict[str, Any]) -> None:
    state["raised"] = max(1.0, _SHRINK * state["raised"])


def _raise(state: dict[str, Any]) -> None:
    state["raised"] *= _GROW
    state["damping"] *= _GROW


def damping_rule(damping: Any) -> tuple[AdaptiveDamping, float]:
    """Return the rule of a setting ``damping``, and the first α, 0 where the rule finds it.

    Raises:
        TypeError: it is no number, function or rule.
        ValueError: it is a number that is not positive.
    """
    if isinstance(damping, AdaptiveDamping):
        return damping, getattr(damping, "start", 0.0)
    if callable(damping):
        return Given(damping), 0.0
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        rules = "GainRatio(), EffectiveDimension()"
        raise TypeError(f"damping must be a number, a function of the step or one of {rules}, got {damping!r}")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive and finite, got {damping}")
    return Given(Exponential(damping, 1.0, damping)), float(damping)
