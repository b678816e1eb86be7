"""The attempts of one step: directions with more and more damping, until one lowers the loss.

Dimensions: R residuals of all terms, K entries of the trained parameters, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.least_squares import search
from tengrad_triton.least_squares.damping import AdaptiveDamping
from tengrad_triton.least_squares.evaluations import Evaluations
from tengrad_triton.least_squares.search import LineSearch
from tengrad_triton.least_squares.systems import System

_PROBE = 0.1  # how far along δ the second derivative is taken (Transtrum and Sethna 2012, section 3)
_LONGEST = 0.75  # of 2 ‖q‖ / ‖δ‖: beyond it the expansion of which q is a term does not converge (there, section 2)
_MOST_ATTEMPTS = 40
_WITH_MOMENTUM = 3  # attempts that keep the last direction, which more damping does not shorten


@dataclass(frozen=True)
class Proposal:
    """A step θ − η δ − η² q.

    Attributes:
        delta_K: δ.
        curve_K: q; None without acceleration.
        own_K: what SPRING remembers, δ before its bias correction.
        count: how many directions it is made of.
        linear: 2 ⟨r̃, J̃ δ⟩, the slope of the loss along −δ.
        quadratic: ‖J̃ δ‖².
    """

    delta_K: Tensor
    curve_K: Tensor | None
    own_K: Tensor
    count: int
    linear: float
    quadratic: float

    def at(self, start_K: Tensor, length: float) -> Tensor:
        """Return θ − η δ − η² q."""
        theta_K = start_K - length * self.delta_K
        return theta_K if self.curve_K is None else theta_K - length**2 * self.curve_K

    @property
    def longest(self) -> float:
        """Return the η at which the linear model's loss is least; steps of SPRING may overshoot it."""
        return self.linear / (2 * self.quadratic) if self.quadratic > 0 else math.inf

    @property
    def best_decrease(self) -> float:
        """Return by how much the linear model expects the loss to fall at that η."""
        return self.linear**2 / (4 * self.quadratic) if self.quadratic > 0 else self.linear

    def predicted(self, length: float) -> float:
        """Return by how much the linear model of r̃ expects the loss to fall."""
        return length * self.linear - length**2 * self.quadratic


@dataclass(frozen=True)
class Outcome:
    """How the attempts ended.

    Attributes:
        proposal: the step that was taken; None if none was.
        damping: α of the last attempt.
        length: the η of the step.
        loss: after it; before it if none was taken.
        ratio: the decrease of the loss over the predicted one.
        attempts: how many there were.
    """

    proposal: Proposal | None
    damping: float
    length: float
    loss: float
    ratio: float
    attempts: int


@dataclass(frozen=True)
class Momentum:
    """SPRING's last direction φ [K], None at first, its μ, and the number of directions so far."""

    last_K: Tensor | None
    mu: float
    count: int


class Attempts:
    """Looks for a step that lowers the loss.

    Args:
        evaluations: of the residuals at the step's points.
        system: the normal equations at the step's beginning.
        r_R: r̃ there.
        momentum: of SPRING.
        acceleration: whether to add q.
        line_search: along each direction.
    """

    def __init__(
        self, evaluations: Evaluations, system: System, r_R: Tensor, momentum: Momentum, acceleration: bool,
        line_search: LineSearch | None,
    ) -> None:  # fmt: skip
        self._evaluations, self._system, self._r_R = evaluations, system, r_R
        self._momentum, self._acceleration, self._line_search = momentum, acceleration, line_search
        self._loss = float(r_R.square().sum())
        self._precision = float(torch.finfo(r_R.dtype).eps)

    def run(self, rule: AdaptiveDamping, state: dict[str, Any], lr: float) -> Outcome:
        """Return the first step that lowers the loss; after each that does not ``rule`` raises ``state["damping"]``.

        There is none if even the linear model expects no decrease beyond rounding, or if the step is lost in θ's. Where
        that is so at the first damping, it may only be too large: then it falls before anything is tried.
        """
        if not lr:
            return Outcome(None, state["damping"], 0.0, self._loss, 0.0, 0)
        has_failed = False
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            alpha = state["damping"]
            proposal = self._promising(alpha, attempt)
            if proposal is not None:
                if self._is_lost(proposal):
                    if has_failed or not rule.lower(state):
                        break
                    continue
                if self._is_short(proposal):
                    length, loss = self._searched(proposal, min(lr, proposal.longest))
                    if loss < self._loss:
                        predicted = proposal.predicted(length)
                        ratio = (self._loss - loss) / predicted if predicted > 0 else 1.0
                        rule.accept(state, ratio)
                        return Outcome(proposal, alpha, length, loss, ratio, attempt)
            rule.reject(state)
            has_failed = True
        return Outcome(None, alpha, 0.0, self._loss, 0.0, attempt)

    def _promising(self, alpha: float, attempt: int) -> Proposal | None:
        """Return the step with the last direction, or the one without it where the first is not expected to pay."""
        if self._momentum.last_K is not None and attempt <= _WITH_MOMENTUM:
            proposal = self._proposal(alpha, self._momentum)
            if proposal is None or not self._is_lost(proposal):
                return proposal
        return self._proposal(alpha, Momentum(None, self._momentum.mu, 0))

    def _is_lost(self, proposal: Proposal) -> bool:
        """Whether rounding hides the step, or the decrease of the loss that the linear model expects at best."""
        start_K = self._evaluations.start_K
        hidden = float(proposal.delta_K.norm()) <= self._precision * float(start_K.norm())
        return hidden or proposal.linear <= 0 or proposal.best_decrease <= self._precision * self._loss

    def _proposal(self, alpha: float, momentum: Momentum) -> Proposal | None:
        """Return the step with a damping; None where its matrix cannot be factored."""
        if not self._system.factor(alpha):
            return None
        r_R, mu = self._r_R, momentum.mu
        if momentum.last_K is not None:
            kept_K = mu * momentum.last_K
            own_K = kept_K + self._system.direction(r_R - self._system.image(kept_K))
        else:
            own_K = self._system.direction(r_R)
        count = momentum.count + 1
        delta_K = own_K / math.sqrt(1 - mu ** (2 * count)) if mu else own_K
        if not bool(delta_K.isfinite().all()):
            return None
        image_R = self._system.image(delta_K)
        linear, quadratic = self._system.decrease(r_R, delta_K, image_R)
        curve_K = self._curve(delta_K, image_R) if self._acceleration else None
        return Proposal(delta_K, curve_K, own_K, count, linear, quadratic)

    def _curve(self, delta_K: Tensor, image_R: Tensor) -> Tensor:
        """Return q = ½ (J̃ᵀ J̃ + α I)⁻¹ J̃ᵀ r̃'', where r̃'' is the second derivative along δ, by a difference."""
        ahead_R = self._evaluations.at(self._evaluations.start_K - _PROBE * delta_K)
        second_R = (2 / _PROBE) * ((ahead_R - self._r_R) / _PROBE + image_R)
        return 0.5 * self._system.direction(second_R)

    def _is_short(self, proposal: Proposal) -> bool:
        """Whether q is short enough beside δ; false where it is not finite."""
        if proposal.curve_K is None:
            return True
        return 2 * float(proposal.curve_K.norm()) <= _LONGEST * float(proposal.delta_K.norm())

    def _searched(self, proposal: Proposal, lr: float) -> search.Trial:
        """Return the step length that the line search takes, and the loss there."""
        start_K = self._evaluations.start_K

        def loss_at(length: float) -> float:
            loss = float(self._evaluations.at(proposal.at(start_K, length)).square().sum())
            return loss if math.isfinite(loss) else math.inf

        def losses_at(lengths: Sequence[float]) -> Tensor:
            thetas_TK = torch.stack([proposal.at(start_K, length) for length in lengths])
            return self._evaluations.at_many(thetas_TK).square().sum(1)

        if self._line_search == "grid":
            return search.grid(lr, losses_at)
        if self._line_search == "armijo":
            return search.armijo(lr, self._loss, proposal.linear, loss_at)
        return lr, loss_at(lr)
