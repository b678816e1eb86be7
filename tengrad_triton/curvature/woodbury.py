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

from tengrad_triton.curvature.grouped import Work, expand_updates_, grams, projections, side_by_side
from tengrad_triton.curvature.jacobian import Jacobian, Jacobians, PerSample
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels import update_
from tengrad_triton.profiling import phase

FisherBlocks = Mapping[str, Sequence[str]]
"""The blocks that are solved together, by the name of their system: each by itself, or all of the network."""


@dataclass(frozen=True)
class Stack:
    """FisherBlocks of one size: W = C⁻¹ with C Cᵀ = K + N α I, so that (K + N α I)⁻¹ = Wᵀ W."""

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
        damping_L: the damping α that was factored with K, by system; only this one makes the identity hold.
        failures_L: how many factorizations of each system have failed so far.
    """

    blocks: Jacobians
    systems: FisherBlocks
    stacks: Sequence[Stack]
    window: tuple[int, ...]
    damping_L: Tensor
    failures_L: Tensor

    @property
    def rows(self) -> int:
        """Return N."""
        return sum(self.window)

    @property
    def is_released(self) -> bool:
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
        divisors, others = self.damping_L, [target for target in targets if self._rows_of(target) is None]
        work = self._work(targets)
        w: list[Tensor] = []
        with phase("solve"):
            if work:
                y_LN = projections(work, len(self.systems), self._length())
                w = self._solve(y_LN, ops)
                if trust_region is not None:
                    divisors = divisors / self._scale(work, y_LN, w, trust_region)
        with phase("update"):
            if work:
                expand_updates_(work, w, divisors.unbind())
            for target in (other.add_spring(1.0) for other in others):
                update_(target.parameter, target.momentum, target.grad, target.settings, target.nesterov)

    def curvature_along(self, targets: Sequence[Target]) -> Tensor:
        """Return δᵀ F δ = ‖J δ‖² / N (M8) for the directions that the targets have as their gradients."""
        work = self._work([target._replace(spring=0.0) for target in targets])
        if not work:
            return torch.zeros(())
        return projections(work, len(self.systems), self._length()).square().sum() / self.rows

    def _work(self, targets: Sequence[Target]) -> list[Work]:
        """Return what there is to do: every target that has a J, add_spring along its last direction (SPRING)."""
        divisors = self.damping_L.unbind()
        system_of = {block: index for index, blocks in enumerate(self.systems.values()) for block in blocks}
        work = []
        for target in targets:
            rows = self._rows_of(target)
            if rows is not None:
                system = system_of[target.block]
                work.append(Work(rows, system, target.add_spring(divisors[system])))
        return work

    def _rows_of(self, target: Target) -> Jacobian | None:
        return self.blocks.get(target.block, {}).get(target.label)

    def _length(self) -> int:
        return max(stack.inverse_LNN.shape[-1] for stack in self.stacks)

    def _solve(self, y_LN: Tensor, ops: Any) -> list[Tensor]:
        """Return w_N = (K + N α I)⁻¹ y of every system."""
        w: dict[str, Tensor] = {}
        rows = dict(zip(self.systems, y_LN.unbind(), strict=True))
        for stack in self.stacks:
            size = stack.inverse_LNN.shape[-1]
            whole = stack.systems == tuple(self.systems) and size == y_LN.shape[1]
            y_SN = y_LN if whole else torch.stack([rows[system][:size] for system in stack.systems])
            solved = ops.cholesky_solve(stack.inverse_LNN, y_SN.to(stack.inverse_LNN.dtype))
            w |= dict(zip(stack.systems, solved.unbind(), strict=True))
        return [w[system] for system in self.systems]

    def _scale(self, work: Sequence[Work], y_LN: Tensor, w: Sequence[Tensor], trust_region: float) -> Tensor:
        """Return min(1, (κ / Σ lr² dᵀ (F + α I) d)^½), without waiting for it: the step's squared Fisher norm is ≤ κ.

        dᵀ (F + α I) d = ⟨d, V⟩ = (‖V‖² − ⟨J V, w⟩) / α, from what is there before d is (M14).
        """
        divisors, n = self.damping_L.unbind(), y_LN.shape[1]
        parts = list(dict.fromkeys((one.system, one.target.group) for one in work))
        if len(parts) > len({system for system, _ in parts}):  # a system with several learning rates
            split = [one._replace(system=parts.index((one.system, one.target.group))) for one in work]
            y_PN = projections(split, len(parts), n)
        else:
            y_PN = torch.stack([y_LN[system] for system, _ in parts])
        w_PN = torch.stack([_padded(w[system], n) for system, _ in parts])
        rates = {one.target.group: one.target.settings[0] for one in work}
        share_P = torch.stack([rates[group] for _, group in parts]).square() / torch.stack(
            [divisors[k] for k, _ in parts]
        )
        norms = torch._foreach_norm([one.target.grad for one in work], 2, dtype=y_LN.dtype)
        share_T = torch.stack([share_P[parts.index((one.system, one.target.group))] for one in work])
        total = (share_T * torch.stack(norms).square()).sum() - (share_P * (y_PN * w_PN).sum(1)).sum()
        return (trust_region / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1.0)


def curvature(
    blocks: Jacobians,
    systems: FisherBlocks,
    window: tuple[int, ...],
    damping_L: Tensor,
    failures_L: Tensor,
    ops: Any,
    tol: Mapping[str, float] | None = None,
    relative: bool = False,
) -> Curvature:
    """Factor K + N α I for every system, those of one size in one batch; ``failures_L`` counts each one's so far.

    Where the factorization fails because rounding made K indefinite, that system takes the gradient over its largest
    possible curvature until the next refresh: w = 0 and the divisor α + trace(K) / N ≥ α + λ_max(F). Each failure
    raises the system's damping tenfold from the next refresh on.

    Where the damping is ``relative``, it is in units of the system's trace(K) / N = tr F, and at least of 1.

    A system with fewer parameters than rows is solved in the space of its parameters, unless older rows have to be kept
    with it. The systems named in ``tol`` are compressed to that tolerance: their rank, and nothing else, is read back
    from the device.
    """
    if not blocks:
        return Curvature(blocks, {}, (), window, damping_L, failures_L)
    if len(window) == 1:
        blocks = {name: rows for names in systems.values() for name, rows in _reduced(blocks, names).items()}
    order, n = list(systems), sum(window)
    sized = _grams(blocks, systems)
    traces = {
        system: trace
        for members, k_LNN in sized
        for system, trace in zip(members, k_LNN.diagonal(dim1=1, dim2=2).sum(1).unbind(), strict=True)
    }
    failures_L = failures_L.to(sized[0][1])
    trace_L = torch.stack([traces[system] for system in order]) / n
    damping_L = damping_L.to(failures_L) * 10.0**failures_L
    if relative:
        damping_L = damping_L * trace_L.clamp(min=1.0)
    bound_L = damping_L + trace_L
    shifts = dict(zip(order, (n * damping_L).unbind(), strict=True))
    stacks: list[Stack] = []
    healthy: dict[str, Tensor] = {}
    for members, k_LNN in sized:
        factor_LNN, pivot_L = ops.cholesky(k_LNN, torch.stack([shifts[system] for system in members]))
        healthy_L = pivot_L > 0  # false for NaN too
        stacks.append(Stack(members, torch.where(healthy_L[:, None, None], ops.cholesky_inverse(factor_LNN), 0.0)))
        healthy |= dict(zip(members, healthy_L.unbind(), strict=True))
    healthy_L = torch.stack([healthy[system] for system in order])
    damping_L = torch.where(healthy_L, damping_L, bound_L)
    factored = Curvature(side_by_side(blocks), systems, stacks, window, damping_L, failures_L + ~healthy_L)
    if not tol:
        return factored
    of_system = {system: k_NN for members, k_LNN in sized for system, k_NN in zip(members, k_LNN, strict=True)}
    return compress(factored, of_system, shifts, tol)


def _padded(w_N: Tensor, n: int) -> Tensor:
    return w_N if len(w_N) == n else F.pad(w_N, (0, n - len(w_N)))


def _grams(blocks: Jacobians, systems: FisherBlocks) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return the Gram matrices of all systems, k_LNN, those of one size together."""
    rows = {system: next(j.rows for name in names for j in blocks[name].values()) for system, names in systems.items()}
    found = []
    for size in sorted(set(rows.values())):
        members = tuple(system for system in systems if rows[system] == size)
        parts = [
            (j, at) for at, system in enumerate(members) for name in systems[system] for j in blocks[name].values()
        ]
        found.append((members, grams(parts, len(members))))
    return found


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


def directions(k_NN: Tensor, shift: Tensor | float, tol: float) -> tuple[Tensor, Tensor]:
    """Return the combinations of rows that are worth keeping, and (λ + N α)^-½ of each."""
    eigenvalues_N, q_NN = torch.linalg.eigh(k_NN)
    kept = eigenvalues_N / (eigenvalues_N + shift) >= tol
    return q_NN[:, kept].mT, (eigenvalues_N[kept] + shift).rsqrt()


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
        directions_RN, root_R = directions(grams[system], shifts[system], tol[system])
        for name in full.systems[system]:
            blocks[name] = {label: rows.combined(directions_RN) for label, rows in full.blocks[name].items()}
        return torch.diag(F.pad(root_R, (0, len(inverse_NN) - len(root_R))))

    stacks = [
        Stack(
            stack.systems,
            torch.stack([compressed(*pair) for pair in zip(stack.systems, stack.inverse_LNN, strict=True)]),
        )
        for stack in full.stacks
    ]
    return replace(full, blocks=blocks, stacks=stacks)
