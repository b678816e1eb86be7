"""The natural gradient by the Woodbury identity: factor once a refresh, solve every step.

Dimensions: L systems, N rows of J, K entries of a system's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.jacobian import Jacobian, PerSample
from tengrad_triton.kernels import update_
from tengrad_triton.update import Target

BlockJacobian = Mapping[str, Jacobian]
"""A block's J, side by side: the parameters' names within their layer, and the rows of each."""
Systems = Mapping[str, Sequence[str]]
"""The blocks that are solved together, by the name of their system: each by itself, or all of the network."""
Jacobians = Mapping[str, BlockJacobian]


@dataclass(frozen=True)
class Stack:
    """Systems of one size: W = C⁻¹ with C Cᵀ = K + N α I, so that (K + N α I)⁻¹ = Wᵀ W."""

    systems: tuple[str, ...]
    inverse_LNN: Tensor


@dataclass(frozen=True)
class Curvature:
    """What one refresh leaves behind for the steps until the next: every block's J, and the factored systems.

    Attributes:
        blocks: J of every block, by the block's name.
        systems: which blocks are solved together.
        stacks: the systems' factors, by size.
        window: rows of J that each of the refreshes within the history gave, the newest first.
        divisor_L: the damping α that was factored with K, by system; only this one makes the identity hold.
        failures_L: how many factorizations of each system have failed so far.
    """

    blocks: Jacobians
    systems: Systems
    stacks: Sequence[Stack]
    window: tuple[int, ...]
    divisor_L: Tensor
    failures_L: Tensor

    @property
    def rows(self) -> int:
        """Return N."""
        return sum(self.window)

    @property
    def is_spent(self) -> bool:
        """Whether J is gone: only what the next refresh reads, the failures, is left."""
        return any(not rows for rows in self.blocks.values())

    def spent(self) -> Curvature:
        """Return what is left when no step will use J any more, so that its memory serves the refresh to come."""
        return replace(self, blocks={name: {} for name in self.blocks}, stacks=(), window=())

    def step_(self, targets: Sequence[Target], ops: Any, trust_region: float | None = None) -> None:
        """Update every target along its block's natural gradient, or along its gradient where the block has no J.

        The natural gradient is (F + α I)⁻¹ V = (V − Jᵀ w) / α with w = (K + N α I)⁻¹ J V (paper, equation 4). All that
        can fail comes before the first update.
        """
        divisors = self.divisors()
        pulled = [target.pulled(divisors.get(target.block, 1.0)) for target in targets]
        projected = [self._project(target) for target in pulled]
        solved = self._solve(pulled, projected, ops)
        if trust_region is not None:
            scale = self._scale(pulled, projected, solved, trust_region)
            divisors = {name: divisor / scale for name, divisor in divisors.items()}
        for target in pulled:
            rows = self._rows_of(target)
            if rows is None:
                update_(target.parameter, target.momentum, target.grad, target.settings, target.nesterov)
            else:
                rows.expand_update_(target, solved[target.block], divisors[target.block])

    def curvature_along(self, targets: Sequence[Target]) -> Tensor:
        """Return δᵀ F δ = ‖J δ‖² / N (M8) for the directions that the targets have as their gradients."""
        y_N: dict[str, Tensor] = {}
        for name, y in zip((t.block for t in targets), (self._project(t) for t in targets), strict=True):
            if y is not None:
                system = self._system_of()[name]
                y_N[system] = y + y_N[system] if system in y_N else y
        squares = [y.square().sum() for y in y_N.values()]
        return torch.stack(squares).sum() / self.rows if squares else torch.zeros(())

    def divisors(self) -> dict[str, Tensor]:
        """Return what each block's direction is divided by."""
        by_system = dict(zip(self.systems, self.divisor_L.unbind(), strict=True))
        return {block: by_system[system] for block, system in self._system_of().items()}

    def _system_of(self) -> dict[str, str]:
        return {block: system for system, blocks in self.systems.items() for block in blocks}

    def _rows_of(self, target: Target) -> Jacobian | None:
        return self.blocks.get(target.block, {}).get(target.label)

    def _project(self, target: Target) -> Tensor | None:
        rows = self._rows_of(target)
        return None if rows is None else rows.project(target.grad)

    def _solve(
        self, targets: Sequence[Target], projected: Sequence[Tensor | None], ops: Any
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return w_N = (K + N α I)⁻¹ J V for every block."""
        system_of = self._system_of()
        w_N: dict[str, Tensor] = {}
        for stack in self.stacks:
            size = stack.inverse_LNN.shape[-1]
            y_N = {system: stack.inverse_LNN.new_zeros(size) for system in stack.systems}
            for target, y in zip(targets, projected, strict=True):
                system = system_of.get(target.block)
                if y is not None and system in y_N:
                    y_N[system] = y_N[system] + F.pad(y, (0, size - len(y)))
            w_LN = ops.cholesky_solve(stack.inverse_LNN, torch.stack(list(y_N.values())))
            w_N |= dict(zip(stack.systems, w_LN.unbind(), strict=True))
        return {block: w_N[system] for block, system in system_of.items()}

    def _scale(
        self,
        targets: Sequence[Target],
        projected: Sequence[Tensor | None],
        solved: Mapping[str, Tensor],
        trust_region: float,
    ) -> Tensor:
        """Return min(1, (κ / Σ lr² dᵀ (F + α I) d)^½), without waiting for it: the step's squared Fisher norm is ≤ κ.

        dᵀ (F + α I) d = ⟨d, V⟩ = (‖V‖² − ⟨J V, w⟩) / α, from what is there before d is (M14).
        """
        divisors, norms = self.divisors(), []
        for target, y in zip(targets, projected, strict=True):
            if y is not None:
                explained = torch.dot(y, solved[target.block][: len(y)])
                quadratic = (target.grad.to(y.dtype).square().sum() - explained) / divisors[target.block]
                norms.append(target.settings[0].to(y.dtype).square() * quadratic)
        if not norms:
            return torch.ones(())
        total = torch.stack(norms).sum()
        return (trust_region / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1.0)


def curvature(
    blocks: Jacobians,
    systems: Systems,
    window: tuple[int, ...],
    damping_L: Tensor,
    failures_L: Tensor,
    ops: Any,
    tol: Mapping[str, float] | None = None,
) -> Curvature:
    """Factor K + N α I for every system, those of one size in one batch; ``failures_L`` counts each one's so far.

    Where the factorization fails because rounding made K indefinite, that system takes the gradient over its largest
    possible curvature until the next refresh: w = 0 and the divisor α + trace(K) / N ≥ α + λ_max(F). Each failure
    raises the system's damping tenfold from the next refresh on.

    A system with fewer parameters than rows is solved in the space of its parameters, unless older rows have to be kept
    with it. The systems named in ``tol`` are compressed to that tolerance: their rank, and nothing else, is read back
    from the device.
    """
    if not blocks:
        return Curvature(blocks, {}, (), window, damping_L, failures_L)
    if len(window) == 1:
        blocks = {name: rows for names in systems.values() for name, rows in _reduced(blocks, names).items()}
    grams = {system: _gram([blocks[name] for name in names]) for system, names in systems.items()}
    n, first = sum(window), next(iter(grams.values()))
    failures_L = failures_L.to(first)
    damping_L = damping_L.to(first) * 10.0**failures_L
    bound_L = damping_L + torch.stack([k_NN.diagonal().sum() for k_NN in grams.values()]) / n
    order, stacks = list(systems), []
    healthy: dict[str, Tensor] = {}
    for size in sorted({len(k_NN) for k_NN in grams.values()}):
        members = tuple(system for system in order if len(grams[system]) == size)
        shift_L = n * torch.stack([damping_L[order.index(system)] for system in members])
        factor_LNN, pivot_L = ops.cholesky(torch.stack([grams[system] for system in members]), shift_L)
        healthy_L = pivot_L > 0  # false for NaN too
        stacks.append(Stack(members, torch.where(healthy_L[:, None, None], ops.cholesky_inverse(factor_LNN), 0.0)))
        healthy |= dict(zip(members, healthy_L.unbind(), strict=True))
    healthy_L = torch.stack([healthy[system] for system in order])
    divisor_L = torch.where(healthy_L, damping_L, bound_L)
    factored = Curvature(blocks, systems, stacks, window, divisor_L, failures_L + ~healthy_L)
    shifts = dict(zip(order, (n * damping_L).unbind(), strict=True))
    return compress(factored, grams, shifts, tol) if tol else factored


def _reduced(blocks: Jacobians, names: Sequence[str]) -> Jacobians:
    """Return the blocks of a system with J replaced by R of J = Q R where it has fewer parameters than rows.

    Rᵀ R = Jᵀ J: F is the same, and the system is as large as the parameters are many (M12). R is not made where that
    saves nothing, and where J is not explicit.
    """
    chosen = {(name, label): rows for name in names for label, rows in blocks[name].items()}
    explicit = [rows for rows in chosen.values() if isinstance(rows, PerSample) and rows.j_NK.dtype != torch.bfloat16]
    entries = [rows.j_NK.shape[1] for rows in explicit]
    if len(explicit) < len(chosen) or sum(entries) >= len(explicit[0].j_NK):
        return {name: blocks[name] for name in names}
    r_KK = torch.linalg.qr(torch.cat([rows.j_NK for rows in explicit], 1), mode="r").R
    parts = dict(zip(chosen, r_KK.split(entries, dim=1), strict=True))
    return {
        name: {
            label: replace(cast("PerSample", rows), j_NK=parts[name, label].contiguous(), form="parameters")
            for label, rows in blocks[name].items()
        }
        for name in names
    }


def failures_of(names: Sequence[str], before: Curvature | None) -> Tensor:
    """Return how many factorizations of the systems named have failed before, on the device that knows."""
    counts = {} if before is None else dict(zip(before.systems, before.failures_L.unbind(), strict=True))
    none = next((count.new_zeros(()) for count in counts.values()), torch.zeros(()))
    return torch.stack([counts.get(name, none) for name in names]) if names else torch.empty(0)


def compress(
    full: Curvature, grams: Mapping[str, Tensor], shifts: Mapping[str, Tensor], tol: Mapping[str, float]
) -> Curvature:
    """Keep of each system named in ``tol`` the directions whose share of the correction is at least that tolerance.

    With K = Q Λ Qᵀ the rows Jᵀ q_i are orthogonal, of squared norm λ_i, and (K + N α I)⁻¹ becomes diagonal. The share
    of row i is f_i = λ_i / (λ_i + N α). Dropping every i with f_i < tol changes the natural gradient by at most
    tol ‖V‖ / α, and F by what it drops (docs/math.md, M7).
    """
    blocks = dict(full.blocks)

    def compressed(system: str, inverse_NN: Tensor) -> Tensor:
        if system not in tol:
            return inverse_NN
        eigenvalues_N, q_NN = torch.linalg.eigh(grams[system])
        kept = eigenvalues_N / (eigenvalues_N + shifts[system]) >= tol[system]
        for name in full.systems[system]:
            blocks[name] = {label: rows.combined(q_NN[:, kept].mT) for label, rows in full.blocks[name].items()}
        root_R = (eigenvalues_N[kept] + shifts[system]).rsqrt()
        return torch.diag(F.pad(root_R, (0, len(kept) - len(root_R))))

    stacks = [
        Stack(
            stack.systems,
            torch.stack([compressed(*pair) for pair in zip(stack.systems, stack.inverse_LNN, strict=True)]),
        )
        for stack in full.stacks
    ]
    return replace(full, blocks=blocks, stacks=stacks)


def _gram(blocks: Sequence[BlockJacobian]) -> Tensor:
    """Return the Gram matrix of a system: its parameters lie side by side in J, so theirs add up."""
    return torch.stack([rows.gram() for block in blocks for rows in block.values()]).sum(0)
