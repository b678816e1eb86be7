"""The step along the natural gradient with a curvature: project, solve, bound, expand.

Dimensions: L Fisher blocks, B blocks of one size, N rows of J, T targets that have a J.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.products import BlockEntry, ProductPlan
from tengrad_triton.curvature.target import Target, bounded_scale, scratch_settings
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.kernels import update_
from tengrad_triton.profiling import phase


def step_(
    curvature: Curvature, targets: Sequence[Target], grads: Sequence[Tensor], ops: Ops, trust_region: float | None
) -> None:
    """Update every target along its natural gradient, or along its gradient where its layer has no J.

    The natural gradient is (F + α I)⁻¹ V = (V − Jᵀ w) / α with w = (K + N α I)⁻¹ J V (paper, equation 4). The gradients
    are checked against J before the first update.

    Args:
        curvature: holds J and the factored blocks.
        targets: the parameters, updated in place.
        grads: V, the gradient of what is minimized with respect to each.
        ops: the kernels.
        trust_region: κ, the bound of M14; None for no bound.
    """
    _plan_of(curvature, targets).step_(grads, ops, trust_region)


def curvature_along(curvature: Curvature, targets: Sequence[Target], direction: Sequence[Tensor]) -> Tensor:
    """Return δᵀ F δ = ‖J δ‖² / N (M8) for a direction δ, which has a tensor for each target."""
    return _plan_of(curvature, targets).curvature_along(direction)


def predicted_change(
    curvature: Curvature, targets: Sequence[Target], grads: Sequence[Tensor], steps: Sequence[Tensor]
) -> Tensor:
    """Return ⟨V, δ⟩ + δᵀ F δ / 2 (M8), what the loss changes by the steps δ of the targets with gradients V."""
    linear = torch.stack([(grad * step).sum() for grad, step in zip(grads, steps, strict=True)]).sum()
    return linear + curvature_along(curvature, targets, steps) / 2


def _plan_of(curvature: Curvature, targets: Sequence[Target]) -> StepPlan:
    """Return the plan of the last step, if that had the same list of targets, or else a new one."""
    known: list[StepPlan] = curvature.last_plan
    if not known or known[0].targets is not targets:
        known[:] = [StepPlan(curvature, targets)]
    return known[0]


class StepPlan:
    """What the steps with one curvature and one list of targets have in common: all but the gradients.

    Attributes:
        targets: the list of targets.
    """

    def __init__(self, curvature: Curvature, targets: Sequence[Target]) -> None:
        self.targets = targets
        self._curvature_rows, self._inverses = curvature.rows, curvature.inverses
        self._block_names, self._damping_L = tuple(curvature.blocks), curvature.damping_L
        self._dampings = curvature.damping_L.unbind()
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
        rates: dict[int, set[int]] = {}
        for one in self._entries:
            rates.setdefault(one.block, set()).add(one.target.rate)
        self._has_one_rate = [len(rates[one.block]) == 1 for one in self._entries]

    def step_(self, grads: Sequence[Tensor], ops: Ops, trust_region: float | None) -> None:
        """Do what the function of this name does."""
        if self._entries:
            with phase("solve"):
                own = [
                    one.target.add_spring(grads[place], self._dampings[one.block])
                    for place, one in zip(self._places, self._entries, strict=True)
                ]
                products = self._products.along(own)
                y_LN = products.project()
                w_LN, damping_L = self._solve(y_LN, ops), self._damping_L
                if trust_region is not None:  # d divides by α, so the scale ν of d is α / ν in its place
                    damping_L = damping_L / self._trust_region_scale(own, y_LN, w_LN, trust_region)
            with phase("update"):
                products.expand_update_(w_LN, damping_L)
        with phase("update"):
            for place in self._without_j:  # without J, SPRING is V + μ φ
                target = self.targets[place]
                direction = target.add_spring(grads[place], 1.0)
                update_(target.parameter, target.momentum, direction, target.settings, target.nesterov)

    def curvature_along(self, direction: Sequence[Tensor]) -> Tensor:
        """Return δᵀ F δ (see the function of this name)."""
        if not self._entries:
            return torch.zeros(())
        y_LN = self._products.along([direction[place] for place in self._places]).project()
        return y_LN.square().sum() / self._curvature_rows

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

    def _trust_region_scale(self, grads: Sequence[Tensor], y_LN: Tensor, w_LN: Tensor, trust_region: float) -> Tensor:
        """Return ν = min(1, (κ / Σ δᵀ (F + α I) δ)^½): κ is ``trust_region``, δ = lr d with each own lr (M14)."""
        pairs = list(zip(self._entries, grads, strict=True))
        one_rate = [pair for pair, alone in zip(pairs, self._has_one_rate, strict=True) if alone]
        several_rates = [pair for pair, alone in zip(pairs, self._has_one_rate, strict=True) if not alone]
        norms = [self._norm_with_one_rate(one_rate, y_LN, w_LN)] if one_rate else []
        norms += [self._norm_with_several_rates(several_rates, w_LN)] if several_rates else []
        return bounded_scale(sum(norms[1:], start=norms[0]), trust_region)

    def _norm_with_one_rate(self, pairs: Sequence[tuple[BlockEntry, Tensor]], y_LN: Tensor, w_LN: Tensor) -> Tensor:
        """Return Σ lr² ⟨d, V⟩ = Σ lr² (‖V‖² − ⟨J V, w⟩) / α over blocks with one lr, which needs no d."""
        lr_of: dict[int, Tensor] = {}
        for one, _ in pairs:
            if one.target.rate not in lr_of:
                lr_of[one.target.rate] = one.target.lr
        lr = {one.block: lr_of[one.target.rate] for one, _ in pairs}
        weight_B = torch.stack(list(lr.values())).square() / torch.stack([self._dampings[block] for block in lr])
        inner = (y_LN * w_LN).sum(1).unbind()
        inner_B = torch.stack([inner[block] for block in lr])
        norm_T = torch.stack(torch._foreach_norm([grad for _, grad in pairs], 2, dtype=y_LN.dtype))
        weights = dict(zip(lr, weight_B.unbind(), strict=True))
        weight_T = torch.stack([weights[one.block] for one, _ in pairs])
        return (weight_T * norm_T.square()).sum() - (weight_B * inner_B).sum()

    def _norm_with_several_rates(self, pairs: Sequence[tuple[BlockEntry, Tensor]], w_LN: Tensor) -> Tensor:
        """Return Σ ‖J δ‖² / N + α ‖δ‖² over blocks with several lr, which takes more products with J."""
        rates = {one.target.rate: scratch_settings(one.target.settings) for one, _ in pairs}
        entries = [one._replace(target=one.target.in_scratch(rates[one.target.rate])) for one, _ in pairs]
        plan, steps = ProductPlan(entries, list(w_LN.shape)), [one.target.parameter for one in entries]
        plan.along([grad for _, grad in pairs], once=True).expand_update_(w_LN, self._damping_L)
        norm_T = torch.stack(torch._foreach_norm(steps, 2, dtype=w_LN.dtype))
        damping_T = torch.stack([self._dampings[one.block] for one in entries])
        projected_LN = plan.along(steps, once=True).project()
        return projected_LN.square().sum() / self._curvature_rows + (damping_T * norm_T.square()).sum()
