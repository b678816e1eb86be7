"""The natural gradient by the Woodbury identity: factor every Fisher block at a refresh, solve at every step.

Dimensions: L Fisher blocks, B blocks of one size, N rows of J, K entries of a gradient, R directions, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.jacobian import reduce_rows, store_contiguously
from tengrad_triton.curvature.products import BlockEntry, Jacobian, Jacobians, expand_updates_, grams, projections
from tengrad_triton.curvature.target import Target, bounded_scale, scratch_settings
from tengrad_triton.kernels import update_
from tengrad_triton.profiling import phase

FisherBlocks = Mapping[str, Sequence[str]]
"""The names of the layers that are solved together, by the name of their Fisher block (M11)."""


@dataclass(frozen=True)
class InverseFactors:
    """Blocks of one size: W = C⁻¹ with C Cᵀ = K + N α I, so that (K + N α I)⁻¹ = Wᵀ W.

    A compressed block has the diagonal W of `compress`; where a factorization failed, W = 0.
    """

    blocks: tuple[str, ...]
    inverse_BNN: Tensor


def factor(
    jacobians: Jacobians,
    blocks: FisherBlocks,
    history: tuple[int, ...],
    epsilon_L: Tensor,
    failures_L: Tensor,
    ops: Ops,
    tol: Mapping[str, float],
    relative_damping: bool,
) -> Curvature:
    """Factor K + N α I of every block, those of one size in one batch.

    Where rounding made K + N α I indefinite, the factorization fails, and the block steps along V / (α + trace(K) / N)
    until the next refresh. That is no longer than the natural gradient, because trace(K) / N ≥ λ_max(F). Each failure
    raises the block's damping tenfold from the next refresh on.

    Args:
        jacobians: J of every layer.
        blocks: which layers are solved together.
        history: rows of J from each refresh, the newest first.
        epsilon_L: the setting ε of every block (M5).
        failures_L: the failures of every block so far.
        ops: the kernels.
        tol: the tolerance of each block to compress (M7). Reading back its rank is the only synchronization here.
        relative_damping: whether α = ε max(1, trace(K) / N), where trace(K) / N = tr F; otherwise α = ε (M5).
    """
    if not jacobians:
        return Curvature(jacobians, {}, (), history, epsilon_L, failures_L)
    if len(history) == 1:  # a history keeps its rows
        jacobians = {name: layer for names in blocks.values() for name, layer in reduce_rows(jacobians, names).items()}
    n, by_size = sum(history), _grams(jacobians, blocks)
    k = {block: k_NN for names, k_BNN in by_size for block, k_NN in zip(names, k_BNN.unbind(), strict=True)}
    traces = {
        block: trace
        for names, k_BNN in by_size
        for block, trace in zip(names, k_BNN.diagonal(dim1=1, dim2=2).sum(1).unbind(), strict=True)
    }
    failures_L = failures_L.to(by_size[0][1])
    trace_L = torch.stack([traces[block] for block in blocks]) / n
    alpha_L = epsilon_L.to(failures_L) * 10.0**failures_L
    if relative_damping:
        alpha_L = alpha_L * trace_L.clamp(min=1.0)
    shifts = dict(zip(blocks, (n * alpha_L).unbind(), strict=True))
    inverses: list[InverseFactors] = []
    healthy: dict[str, Tensor] = {}
    for names, k_BNN in by_size:
        factor_BNN, pivot_B = ops.cholesky(k_BNN, torch.stack([shifts[block] for block in names]))
        healthy_B = pivot_B > 0  # false for NaN too
        # Where it failed, W = 0 gives w = 0, so that the step is V / (α + trace(K) / N).
        inverse_BNN = torch.where(healthy_B[:, None, None], ops.cholesky_inverse(factor_BNN), 0.0)
        inverses.append(InverseFactors(names, inverse_BNN))
        healthy |= dict(zip(names, healthy_B.unbind(), strict=True))
    healthy_L = torch.stack([healthy[block] for block in blocks])
    used_L = torch.where(healthy_L, alpha_L, alpha_L + trace_L)
    full = Curvature(store_contiguously(jacobians), blocks, inverses, history, used_L, failures_L + ~healthy_L)
    return compress(full, k, shifts, tol) if tol else full


def _grams(jacobians: Jacobians, blocks: FisherBlocks) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return the names and Gram matrices k_BNN of all blocks, those of one size together."""
    rows = {block: next(j.rows for name in names for j in jacobians[name].values()) for block, names in blocks.items()}
    found = []
    for size in sorted(set(rows.values())):
        alike = tuple(block for block in blocks if rows[block] == size)
        layers = [(name, at) for at, block in enumerate(alike) for name in blocks[block]]
        own, of_block = zip(*((j, at) for name, at in layers for j in jacobians[name].values()), strict=True)
        found.append((alike, grams(own, of_block, len(alike))))
    return found


@dataclass(frozen=True)
class Curvature:
    """The result of a refresh, for the steps until the next one: every parameter's J and the factored blocks.

    Attributes:
        jacobians: J of every layer, by the layer's name.
        blocks: which layers are solved together.
        inverses: the blocks' factors, those of one size together.
        history: rows of J from each of the refreshes whose rows are kept, the newest first.
        damping_L: the α of every block, by which its step divides: the one that was factored with K, as the identity
            holds for no other; after a failure α + trace(K) / N.
        failures_L: how many factorizations of each block have failed so far.
    """

    jacobians: Jacobians
    blocks: FisherBlocks
    inverses: Sequence[InverseFactors]
    history: tuple[int, ...]
    damping_L: Tensor
    failures_L: Tensor

    @property
    def rows(self) -> int:
        """Return N, the rows of all refreshes that are kept, before M7 and M12 replace them by fewer."""
        return sum(self.history)

    @property
    def is_released(self) -> bool:
        """Whether J and the factors are freed, so that only the counts of failures are left."""
        return any(not layer for layer in self.jacobians.values())

    def released(self) -> Curvature:
        """Return a copy without J and factors, which frees their memory before a refresh."""
        return replace(self, jacobians={name: {} for name in self.jacobians}, inverses=(), history=())

    def step_(self, targets: Sequence[Target], ops: Ops, trust_region: float | None) -> None:
        """Update every target along its natural gradient, or along its gradient where its layer has no J.

        The natural gradient is (F + α I)⁻¹ V = (V − Jᵀ w) / α with w = (K + N α I)⁻¹ J V (paper, equation 4). The
        gradients are checked against J before the first update.
        """
        entries, dampings = self._entries(targets), self.damping_L
        without_j = [target for target in targets if self._jacobian_of(target) is None]
        w: list[Tensor] = []
        with phase("solve"):
            if entries:
                y_LN = projections(entries, len(self.blocks), self._largest())
                w = self._solve(y_LN, ops)
                if trust_region is not None:  # d divides by α, so the scale ν of d is α / ν in its place
                    dampings = dampings / self._trust_region_scale(entries, y_LN, w, trust_region)
        with phase("update"):
            if entries:
                expand_updates_(entries, w, dampings.unbind())
            for target in (one.add_spring(1.0) for one in without_j):  # without J, SPRING is V + μ φ
                update_(target.parameter, target.momentum, target.grad, target.settings, target.nesterov)

    def curvature_along(self, targets: Sequence[Target]) -> Tensor:
        """Return δᵀ F δ = ‖J δ‖² / N (M8), where δ is given as the targets' gradients."""
        entries = self._entries([target._replace(spring=0.0) for target in targets])
        if not entries:
            return torch.zeros(())
        return projections(entries, len(self.blocks), self._largest()).square().sum() / self.rows

    def _entries(self, targets: Sequence[Target]) -> list[BlockEntry]:
        """Return every target that has a J, with SPRING's term added to its gradient."""
        dampings = self.damping_L.unbind()
        block_of = {layer: index for index, layers in enumerate(self.blocks.values()) for layer in layers}
        entries = []
        for target in targets:
            jacobian = self._jacobian_of(target)
            if jacobian is not None:
                block = block_of[target.layer]
                entries.append(BlockEntry(jacobian, block, target.add_spring(dampings[block])))
        return entries

    def _jacobian_of(self, target: Target) -> Jacobian | None:
        return self.jacobians.get(target.layer, {}).get(target.param_name)

    def _largest(self) -> int:
        """Return the largest number of rows of a block."""
        return max(one.inverse_BNN.shape[-1] for one in self.inverses)

    def _solve(self, y_LN: Tensor, ops: Ops) -> list[Tensor]:
        """Return w_N = (K + N α I)⁻¹ y of every block."""
        w: dict[str, Tensor] = {}
        y = dict(zip(self.blocks, y_LN.unbind(), strict=True))
        for one in self.inverses:
            size = one.inverse_BNN.shape[-1]
            all_alike = one.blocks == tuple(self.blocks) and size == y_LN.shape[1]
            y_BN = y_LN if all_alike else torch.stack([y[block][:size] for block in one.blocks])
            solved = ops.cholesky_solve(one.inverse_BNN, y_BN.to(one.inverse_BNN.dtype))
            w |= dict(zip(one.blocks, solved.unbind(), strict=True))
        return [w[block] for block in self.blocks]

    def _trust_region_scale(
        self, entries: Sequence[BlockEntry], y_LN: Tensor, w: Sequence[Tensor], trust_region: float
    ) -> Tensor:
        """Return ν = min(1, (κ / Σ δᵀ (F + α I) δ)^½): κ is ``trust_region``, δ = lr d with each group's lr (M14)."""
        groups: dict[int, set[int]] = {}
        for one in entries:
            groups.setdefault(one.block, set()).add(one.target.group)
        one_rate = [one for one in entries if len(groups[one.block]) == 1]
        several_rates = [one for one in entries if len(groups[one.block]) > 1]
        norms = [self._norm_with_one_rate(one_rate, y_LN, w)] if one_rate else []
        norms += [self._norm_with_several_rates(several_rates, y_LN, w)] if several_rates else []
        return bounded_scale(sum(norms[1:], start=norms[0]), trust_region)

    def _norm_with_one_rate(self, entries: Sequence[BlockEntry], y_LN: Tensor, w: Sequence[Tensor]) -> Tensor:
        """Return Σ lr² ⟨d, V⟩ = Σ lr² (‖V‖² − ⟨J V, w⟩) / α over blocks with one lr, which needs no d."""
        dampings, n = self.damping_L.unbind(), y_LN.shape[1]
        lr = {one.block: one.target.lr for one in entries}
        weight_B = torch.stack(list(lr.values())).square() / torch.stack([dampings[block] for block in lr])
        w_BN = torch.stack(
            [w[block] if len(w[block]) == n else F.pad(w[block], (0, n - len(w[block]))) for block in lr]
        )
        inner_B = (torch.stack([y_LN[block] for block in lr]) * w_BN).sum(1)
        norm_T = torch.stack(torch._foreach_norm([one.target.grad for one in entries], 2, dtype=y_LN.dtype))
        weights = dict(zip(lr, weight_B.unbind(), strict=True))
        weight_T = torch.stack([weights[one.block] for one in entries])
        return (weight_T * norm_T.square()).sum() - (weight_B * inner_B).sum()

    def _norm_with_several_rates(self, entries: Sequence[BlockEntry], y_LN: Tensor, w: Sequence[Tensor]) -> Tensor:
        """Return Σ ‖J δ‖² / N + α ‖δ‖² over blocks with several lr, which takes two more products with J."""
        dampings = self.damping_L.unbind()
        rates = {one.target.group: scratch_settings(one.target.settings) for one in entries}
        scratch = [one._replace(target=one.target.in_scratch(rates[one.target.group])) for one in entries]
        expand_updates_(scratch, w, dampings)
        steps = [one._replace(target=one.target._replace(grad=one.target.parameter)) for one in scratch]
        norm_T = torch.stack(torch._foreach_norm([one.target.grad for one in steps], 2, dtype=y_LN.dtype))
        damping_T = torch.stack([dampings[one.block] for one in steps])
        return projections(steps, *y_LN.shape).square().sum() / self.rows + (damping_T * norm_T.square()).sum()


def directions(k_NN: Tensor, shift: Tensor | float, tol: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of K with f_i ≥ tol (M7), one a row of the result, and (λ_i + N α)^-½ of each."""
    eigenvalues_N, q_NN = torch.linalg.eigh(k_NN)
    kept = eigenvalues_N / (eigenvalues_N + shift) >= tol
    return q_NN[:, kept].mT, (eigenvalues_N[kept] + shift).rsqrt()


def compress(
    full: Curvature, k: Mapping[str, Tensor], shifts: Mapping[str, Tensor], tol: Mapping[str, float]
) -> Curvature:
    """Keep the directions with f_i ≥ tol of each block in ``tol``.

    With K = Q Λ Qᵀ the rows Jᵀ q_i are orthogonal, of squared norm λ_i, and (K + N α I)⁻¹ becomes diagonal. The share
    of row i is f_i = λ_i / (λ_i + N α). Dropping every i with f_i < tol changes the natural gradient by at most
    tol ‖V‖ / α, and F by what it drops (M7). ``k`` holds K and ``shifts`` N α of every block.
    """
    jacobians = dict(full.jacobians)

    def compressed(block: str, inverse_NN: Tensor) -> Tensor:
        if block not in tol:
            return inverse_NN
        directions_RN, root_R = directions(k[block], shifts[block], tol[block])
        for name in full.blocks[block]:
            jacobians[name] = {
                param_name: one.combine(directions_RN) for param_name, one in full.jacobians[name].items()
            }
        return torch.diag(F.pad(root_R, (0, len(inverse_NN) - len(root_R))))

    inverses = [
        InverseFactors(
            one.blocks,
            torch.stack([compressed(*pair) for pair in zip(one.blocks, one.inverse_BNN, strict=True)]),
        )
        for one in full.inverses
    ]
    return replace(full, jacobians=jacobians, inverses=inverses)
