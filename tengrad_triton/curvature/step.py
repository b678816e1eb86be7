"""The step along the natural gradient with a curvature: project, solve, bound, expand.

Dimensions: L Fisher blocks, B blocks of one size, N rows of J, T targets that have a J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.products import BlockEntry, ProductPlan
from tengrad_triton.curvature.scaling import clip_scale, unit_of
from tengrad_triton.curvature.shards.cut import divide, own_scale
from tengrad_triton.curvature.shards.metric import metric_of
from tengrad_triton.curvature.target import (
    Average,
    Target,
    averaged,
    bounded_scale,
    places_of_averages,
    remember_,
    scratch_settings,
)
from tengrad_triton.curvature.woodbury import Bounds, Curvature
from tengrad_triton.kernels import update_
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.profiling import phase


def step_(
    curvature: Curvature,
    targets: Sequence[Target],
    grads: Sequence[Tensor],
    ops: Ops,
    trust_region: float | None,
    averages: Sequence[Average | None],
    clip_threshold: float | None,
    projected: Mapping[int, Tensor] | None = None,
) -> Bounds:
    """Update every target along its natural gradient, or along its gradient where its layer has no J.

    The natural gradient is (F + α I)⁻¹ V = (V − Jᵀ w) / α with w = (K + N α I)⁻¹ J V (paper, equation 4). With scaled
    damping the step is along α (F + α D)⁻¹ V = D⁻¹ (V − Jᵀ w) with w = (J D⁻¹ Jᵀ + N α I)⁻¹ J D⁻¹ V (M17).
    The gradients are checked against J before the first update.

    Args:
        curvature: holds J and the factored blocks.
        targets: the parameters, updated in place.
        grads: V, the gradient of what is minimized with respect to each.
        ops: the kernels.
        trust_region: κ, the bound of M14; None for no bound.
        averages: how each parameter group averages its gradients first; empty where momentum is part of the update.
        clip_threshold: the bound of M17 on the step of each block with scaled damping; None for no bound.
        projected: J D⁻¹ V of the targets, by index, for which it is known without V (M19).

    Returns:
        what the two bounds multiplied the steps by: one number for each block, and one for all; None without a bound.
    """
    places = places_of_averages(targets, averages)
    plan, own = _plan_of(curvature, targets), averaged(targets, grads, places)
    bounds = plan.step_(own, ops, trust_region, clip_threshold, projected or {})
    remember_(targets, grads, places)
    return bounds


def curvature_along(curvature: Curvature, targets: Sequence[Target], direction: Sequence[Tensor]) -> Tensor:
    """Return δᵀ F δ = ‖J δ‖² / N (M8) for a direction δ, which has a tensor for each target."""
    return _plan_of(curvature, targets).curvature_along(direction)


def predicted_change(
    curvature: Curvature, targets: Sequence[Target], grads: Sequence[Tensor], steps: Sequence[Tensor]
) -> Tensor:
    """Return ⟨V, δ⟩ + δᵀ F δ / 2 (M8), what the loss changes by the steps δ of the targets with gradients V."""
    linear = torch.stack([(grad * step).sum() for grad, step in zip(grads, steps, strict=True)]).sum()
    linear = curvature.shards.total(linear)
    return linear + curvature_along(curvature, targets, steps) / 2


def _plan_of(curvature: Curvature, targets: Sequence[Target]) -> StepPlan:
    """Return the plan of the last step, if that had the same list of targets, or else a new one."""
    known: list[StepPlan] = curvature.last_plan
    if not known or known[0].targets is not targets:
        known[:] = [StepPlan(curvature, targets)]
    return known[0]


class _Solved(NamedTuple):
    """What a step knows before its update.

    Attributes:
        grads: V of each entry.
        scaled: D⁻¹ V of each; None if D is the identity.
        y_LN: J D⁻¹ V of each block.
        w_LN: the solution of each block's system.
        divisor_L: what the step of each block divides by.
    """

    grads: list[Tensor]
    scaled: list[Tensor] | None
    y_LN: Tensor
    w_LN: Tensor
    divisor_L: Tensor


class StepPlan:
    """What the steps with one curvature and one list of targets have in common: all but the gradients.

    Attributes:
        targets: the list of targets.
    """

    def __init__(self, curvature: Curvature, targets: Sequence[Target]) -> None:
        self.targets, self._shards = targets, curvature.shards
        self._curvature_rows, self._inverses = curvature.rows, curvature.inverses
        self._block_names, self._divisor_L = tuple(curvature.blocks), curvature.divisor_L
        self._damping_L, self._dampings = curvature.damping_L, curvature.damping_L.unbind()
        self._divisors = curvature.divisor_L.unbind() if curvature.scales else self._dampings
        sizes = [one.inverse_BNN.shape[-1] for one in curvature.inverses]
        self._largest = max(sizes) if sizes else 0
        block_of = {layer: index for index, layers in enumerate(curvature.blocks.values()) for layer in layers}
        j_of = [curvature.jacobians.get(target.layer, {}).get(target.param_name) for target in targets]
        self._places = [place for place, jacobian in enumerate(j_of) if jacobian is not None]
        self._without_j = [place for place, jacobian in enumerate(j_of) if jacobian is None]
        self._entries = [
            BlockEntry(jacobian, block_of[target.layer], target)
            for jacobian, target in zip(j_of, targets, strict=True)
            if jacobian is not None
        ]
        self._products = ProductPlan(self._entries, [len(self._block_names), self._largest])
        own = [one.target.parameter.detach() for one in self._entries]
        self._metric = metric_of([one.jacobian.scale for one in self._entries], own)
        self._is_scaled = len(curvature.scales) > 0
        self._springs = [index for index, one in enumerate(self._entries) if one.target.spring]
        self._clip_weights_LT: Tensor | None = None
        scales = {place: own_scale(curvature.scales, self._shards, targets[place]) for place in self._without_j}
        self._scales_without_j = {place: scale for place, scale in scales.items() if scale is not None}
        rates: dict[int, set[int]] = {}
        for one in self._entries:
            rates.setdefault(one.block, set()).add(one.target.rate)
        self._has_one_rate = [len(rates[one.block]) == 1 for one in self._entries]

    def step_(
        self, grads: Sequence[Tensor], ops: Ops, trust_region: float | None, clip_threshold: float | None,
        projected: Mapping[int, Tensor],
    ) -> Bounds:  # fmt: skip
        """Do what the function of this name does."""
        clip_L = region = None
        if self._entries:
            with phase("solve"):
                own = [grads[place] for place in self._places]
                for index in self._springs:
                    own[index] = self._with_spring(index, own[index])
                scaled = None if self._metric is None else self._metric.inverse(own)
                known = {index: projected[place] for index, place in enumerate(self._places) if place in projected}
                products = self._products.along(own, scaled, projected=known)
                of_clip = None if scaled is None or clip_threshold is None else self._mean_square_L(scaled)
                y_LN, square_L = self._shards.totals(products.project(), of_clip)
                w_LN, divisor_L = self._solve(y_LN, ops), self._divisor_L
                if square_L is not None and clip_threshold is not None:
                    clip_L = clip_scale(square_L, clip_threshold)
                    divisor_L = divisor_L / clip_L
                if trust_region is not None:  # d divides by it, so the scale ν of d divides it
                    region = self._trust_region_scale(_Solved(own, scaled, y_LN, w_LN, divisor_L), trust_region)
                    divisor_L = divisor_L / region
            with phase("update"):
                products.expand_update_(w_LN, divisor_L)
        with phase("update"):
            for place in self._without_j:
                self._update_without_j_(place, grads[place], clip_threshold)
        return clip_L, region

    def _update_without_j_(self, place: int, grad: Tensor, clip_threshold: float | None) -> None:
        """Step along D⁻¹ V, or V where no refresh has seen the parameter, bounded; SPRING adds μ φ."""
        target, scale = self.targets[place], self._scales_without_j.get(place)
        if scale is not None:
            grad = divide(scale, grad)
        if self._is_scaled and clip_threshold is not None:
            square = self._shards.total(widen(grad).square().sum() / target.size) * unit_of(target.parameter) ** 2
            grad = grad * clip_scale(square, clip_threshold)
        keeps_direction = target.spring or not self._is_scaled  # the mean of gradients stays as it is
        momentum = target.momentum if keeps_direction else torch.zeros_like(grad)
        direction = target.add_spring(grad, 1.0, lambda momentum: momentum)
        update_(target.parameter, momentum, direction, target.settings, target.nesterov)

    def curvature_along(self, direction: Sequence[Tensor]) -> Tensor:
        """Return δᵀ F δ (see the function of this name)."""
        if not self._entries:
            return torch.zeros(())
        own = [self._times_d(index, direction[place]) for index, place in enumerate(self._places)]
        y_LN = self._shards.total(self._products.along(own).project())
        return y_LN.square().sum() / self._curvature_rows

    def _with_spring(self, index: int, grad: Tensor) -> Tensor:
        """Return V of an entry, to which SPRING adds c μ D φ; the step divides by c (M13)."""
        one = self._entries[index]
        return one.target.add_spring(grad, self._divisors[one.block], partial(self._times_d, index))

    def _times_d(self, index: int, x: Tensor) -> Tensor:
        """Return D x of an entry."""
        return x if self._metric is None else self._metric.times(index, x)

    def _solve(self, y_LN: Tensor, ops: Ops) -> Tensor:
        """Return w_LN with w_N = (K + N α I)⁻¹ y of every block; zeros follow where a block has fewer rows."""
        first = self._inverses[0]
        if first.blocks == self._block_names:
            return ops.cholesky_solve(first.inverse_BNN, y_LN.to(first.inverse_BNN.dtype))
        w: dict[str, Tensor] = {}
        y = dict(zip(self._block_names, y_LN.unbind(), strict=True))
        for one in self._inverses:
            size = one.inverse_BNN.shape[-1]
            y_BN = torch.stack([y[block][:size] for block in one.blocks])
            solved = ops.cholesky_solve(one.inverse_BNN, y_BN.to(one.inverse_BNN.dtype))
            w |= dict(zip(one.blocks, F.pad(solved, (0, self._largest - size)).unbind(), strict=True))
        return torch.stack([w[block] for block in self._block_names])

    def _mean_square_L(self, scaled: list[Tensor]) -> Tensor:
        """Return the mean square of D⁻¹ V, each weight in its unit, of each block (M17)."""
        if torch.compiler.is_compiling():  # one pass with what made D⁻¹ V; the list of norms would take another
            square_T = torch.stack([x.square().sum() for x in scaled])
        else:
            square_T = torch.stack(torch._foreach_norm(scaled, 2)).square()
        if self._clip_weights_LT is None:
            self._clip_weights_LT = self._weights_of_squares(square_T)
        return self._clip_weights_LT @ square_T

    def _weights_of_squares(self, like: Tensor) -> Tensor:
        """Return what makes each block's mean square of the squared norms, written without a copy to the device."""
        weights_LT = like.new_zeros(len(self._block_names), len(self._entries))
        counts: dict[int, int] = {}
        for one in self._entries:
            counts[one.block] = counts.get(one.block, 0) + one.target.size
        for place, one in enumerate(self._entries):
            weights_LT[one.block, place].fill_(unit_of(one.target.parameter) ** 2 / counts[one.block])
        return weights_LT

    def _trust_region_scale(self, solved: _Solved, trust_region: float) -> Tensor:
        """Return ν = min(1, (κ / Σ δᵀ (F + α D) δ)^½): κ is ``trust_region``, δ = lr d with each own lr (M14)."""
        one_rate = [index for index, alone in enumerate(self._has_one_rate) if alone]
        several_rates = [index for index, alone in enumerate(self._has_one_rate) if not alone]
        norms = [self._norm_with_one_rate(one_rate, solved)] if one_rate else []
        norms += [self._norm_with_several_rates(several_rates, solved)] if several_rates else []
        return bounded_scale(sum(norms[1:], start=norms[0]), trust_region)

    def _norm_with_one_rate(self, indices: Sequence[int], solved: _Solved) -> Tensor:
        """Return Σ lr² α² / c² ⟨V, (F + α D)⁻¹ V⟩ over blocks with one lr, which needs no d = α / c (F + α D)⁻¹ V.

        ⟨V, (F + α D)⁻¹ V⟩ = (⟨V, D⁻¹ V⟩ − ⟨J D⁻¹ V, w⟩) / α. The step divides by c, which is α if D is the identity.
        """
        grads, scaled, y_LN, w_LN, divisor_L = solved
        entries = [self._entries[index] for index in indices]
        lr_of: dict[int, Tensor] = {}
        for one in entries:
            if one.target.rate not in lr_of:
                lr_of[one.target.rate] = one.target.lr
        lr = {one.block: lr_of[one.target.rate] for one in entries}
        of_norm = self._dampings if scaled is None else (divisor_L.square() / self._damping_L).unbind()
        weight_B = torch.stack(list(lr.values())).square() / torch.stack([of_norm[block] for block in lr])
        inner = (y_LN * w_LN).sum(1).unbind()
        inner_B = torch.stack([inner[block] for block in lr])
        own_scaled = scaled and [scaled[i] for i in indices]
        square_T = self._shards.total(_inner_products([grads[i] for i in indices], own_scaled, y_LN.dtype))
        weights = dict(zip(lr, weight_B.unbind(), strict=True))
        weight_T = torch.stack([weights[one.block] for one in entries])
        return (weight_T * square_T).sum() - (weight_B * inner_B).sum()

    def _norm_with_several_rates(self, indices: Sequence[int], solved: _Solved) -> Tensor:
        """Return Σ ‖J δ‖² / N + α ⟨δ, D δ⟩ over blocks with several lr, which takes more products with J."""
        grads, scaled, _, w_LN, divisor_L = solved
        rates = {self._entries[i].target.rate: scratch_settings(self._entries[i].target.settings) for i in indices}
        entries = [
            one._replace(target=one.target.in_scratch(rates[one.target.rate]))
            for one in (self._entries[index] for index in indices)
        ]
        plan, steps = ProductPlan(entries, list(w_LN.shape)), [one.target.parameter for one in entries]
        own_scaled = scaled and [scaled[index].clone() for index in indices]  # the update would overwrite them
        plan.along([grads[i] for i in indices], own_scaled, once=True).expand_update_(w_LN, divisor_L)
        times_d = None  # where D is the identity
        if self._metric is not None:
            times_d = [self._times_d(index, x) for x, index in zip(steps, indices, strict=True)]
        square_T = self._shards.total(_inner_products(steps, times_d, w_LN.dtype))
        damping_T = torch.stack([self._dampings[one.block] for one in entries])
        projected_LN = plan.along(steps if times_d is None else times_d, once=True).project()
        projected_LN = self._shards.total(projected_LN)
        return projected_LN.square().sum() / self._curvature_rows + (damping_T * square_T).sum()


def _inner_products(x: list[Tensor], y: list[Tensor] | None, dtype: torch.dtype) -> Tensor:
    """Return ⟨x_t, y_t⟩ of every pair as a tensor; ‖x_t‖² without ``y``."""
    if y is None:
        return torch.stack(torch._foreach_norm(x, 2, dtype=dtype)).square()
    return torch.stack([one.sum(dtype=dtype) for one in torch._foreach_mul(x, y)])
