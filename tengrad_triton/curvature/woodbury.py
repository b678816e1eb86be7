"""The curvature by the Woodbury identity: every Fisher block is factored at a refresh (`step` has the steps with it).

Dimensions: L Fisher blocks, B blocks of one size, N rows of J, K entries of a gradient, R directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.curvature.jacobians.base import Jacobian, Jacobians
from tengrad_triton.curvature.jacobians.embedding import EmbeddingJacobian
from tengrad_triton.curvature.jacobians.per_sample import reduce_rows, store_contiguously
from tengrad_triton.curvature.moments import AllMoments
from tengrad_triton.curvature.products import grams
from tengrad_triton.curvature.scaling import Scales
from tengrad_triton.kernels.dispatch import rounds_products
from tengrad_triton.kernels.spec import TF32X3, TF32X3_ERROR
from tengrad_triton.sharding.shards import WHOLE, Whole

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
    moments: AllMoments,
    scales: Scales,
    shards: Whole = WHOLE,
) -> Curvature:
    """Factor K + N α I of every block, those of one size in one batch.

    α is at least `least_shares` of trace(K) / N: with less, rounding would decide the step. Where K + N α I is
    indefinite even so, the factorization fails, and the block steps along V / (α + trace(K) / N) until the next
    refresh. That is no longer than the natural gradient, because trace(K) / N ≥ λ_max(F). Each failure raises the
    block's damping tenfold from the next refresh on.

    Args:
        jacobians: J of every layer.
        blocks: which layers are solved together.
        history: rows of J from each refresh, the newest first.
        epsilon_L: the setting ε of every block (M5).
        failures_L: the failures of every block so far.
        ops: the kernels.
        tol: the tolerance of each block to compress (M7). Reading back its rank is the only synchronization here.
        relative_damping: whether α = ε max(1, trace(K) / N), where trace(K) / N = tr F; otherwise α = ε (M5).
        moments: kept for the next refresh (M17).
        scales: D of all parameters; those with J have it in their `Jacobian` too.
        shards: the processes among which parameters are cut; their Gram matrices add up.
    """
    cut = shards if shards.is_cut else None
    if not jacobians:
        numbers = (epsilon_L, epsilon_L, epsilon_L, failures_L)
        return Curvature(jacobians, {}, (), history, *numbers, moments, scales, cut=cut)
    if len(history) == 1 and not shards.is_cut:  # a history keeps its rows, and so does a part of J
        jacobians = {name: layer for names in blocks.values() for name, layer in reduce_rows(jacobians, names).items()}
    n, by_size = sum(history), _grams(jacobians, blocks, shards)
    k = {block: k_NN for names, k_BNN in by_size for block, k_NN in zip(names, k_BNN.unbind(), strict=True)}
    traces = {
        block: trace
        for names, k_BNN in by_size
        for block, trace in zip(names, k_BNN.diagonal(dim1=1, dim2=2).sum(1).unbind(), strict=True)
    }
    failures_L = failures_L.to(by_size[0][1])
    trace_L = torch.stack([traces[block] for block in blocks]) / n
    asked_L = epsilon_L.to(failures_L) * (trace_L.clamp(min=1.0) if relative_damping else 1.0)
    shares = shards.largest(least_shares(jacobians, blocks, by_size[0][1]))
    least_L = torch.stack(torch._foreach_mul([*trace_L.unbind()], shares))
    wanted_L = asked_L * 10.0**failures_L
    alpha_L = wanted_L.maximum(least_L)
    shifts = dict(zip(blocks, (n * alpha_L).unbind(), strict=True))
    inverses, healthy = _inverses(by_size, shifts, ops)
    healthy_L = torch.stack([healthy[block] for block in blocks])
    used_L = torch.where(healthy_L, alpha_L, alpha_L + trace_L)
    divisor_L = used_L / wanted_L if scales else used_L  # a step that is damped more is no longer
    counts_L = failures_L + ~healthy_L
    stored = store_contiguously(
        {name: {key: one.without_what_makes_k() for key, one in layer.items()} for name, layer in jacobians.items()}
    )
    numbers = (used_L, asked_L, divisor_L, counts_L)
    full = Curvature(stored, blocks, inverses, history, *numbers, moments, scales, cut=cut)
    return compress(full, k, shifts, tol) if tol else full


MARGIN = 8
"""The least N α in units of e trace(K), where rounding changes K by e trace(K): a step then changes by a seventh."""
FLOAT32_ERROR = 1e-8
"""e / √N of float32: what Gram matrices and factors of 64 to 2048 rows had, for the worst of four kinds of rows."""
TF32_ERROR = 7e-4
"""e where torch multiplies in TF32."""


def least_shares(jacobians: Jacobians, blocks: FisherBlocks, k_BNN: Tensor) -> list[float]:
    """Return the least α of each block as a share of trace(K) / N, with K like ``k_BNN``; 0 in float64.

    K in float64 would gain nothing: V / α has the rounding errors of V in full, where the natural gradient is shorter.
    """
    if k_BNN.dtype == torch.float64:
        return [0.0] * len(blocks)
    is_rounded = rounds_products(k_BNN.device)

    def error_of(one: Jacobian) -> float:
        in_torch = one.scale is not None or isinstance(one, EmbeddingJacobian) or "gram" not in one.ops.configs
        coarse = TF32X3_ERROR if any(name.endswith(TF32X3) for name in one.ops.kernel_overrides) else 0.0
        return max(FLOAT32_ERROR * math.sqrt(one.rows), TF32_ERROR if is_rounded and in_torch else coarse)

    layers = ([one for name in names for one in jacobians[name].values()] for names in blocks.values())
    return [MARGIN * max(map(error_of, own)) for own in layers]


def _inverses(
    by_size: Sequence[tuple[tuple[str, ...], Tensor]], shifts: Mapping[str, Tensor], ops: Ops
) -> tuple[list[InverseFactors], dict[str, Tensor]]:
    """Return the inverse factors of K + shift I of all blocks, and whether each was factored."""
    inverses: list[InverseFactors] = []
    healthy: dict[str, Tensor] = {}
    for names, k_BNN in by_size:
        factor_BNN, pivot_B = ops.cholesky(k_BNN, torch.stack([shifts[block] for block in names]))
        healthy_B = pivot_B > 0  # false for NaN too
        inverse_BNN = ops.cholesky_inverse(factor_BNN)
        # Where it failed, W = 0 gives w = 0, so that the step is V / (α + trace(K) / N). A CPU may look first.
        if torch.compiler.is_compiling() or not k_BNN.is_cpu or not healthy_B.all():
            inverse_BNN = torch.where(healthy_B[:, None, None], inverse_BNN, 0.0)
        inverses.append(InverseFactors(names, inverse_BNN))
        healthy |= dict(zip(names, healthy_B.unbind(), strict=True))
    return inverses, healthy


def _grams(jacobians: Jacobians, blocks: FisherBlocks, shards: Whole) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return the names and Gram matrices k_BNN of all blocks, those of one size together."""
    rows = {block: next(j.rows for name in names for j in jacobians[name].values()) for block, names in blocks.items()}
    found = []
    for size in sorted(set(rows.values())):
        alike = tuple(block for block in blocks if rows[block] == size)
        layers = [(name, at) for at, block in enumerate(alike) for name in blocks[block]]
        own, of_block = zip(*((j, at) for name, at in layers for j in jacobians[name].values()), strict=True)
        found.append((alike, shards.total(grams(own, of_block, len(alike)))))
    return found


Bounds = tuple[Tensor | None, Tensor | None]
"""What bounds multiplied a step by: `clip_threshold` that of each block [L], the trust region that of all blocks []."""


@dataclass(frozen=True)
class Curvature:
    """The result of a refresh, for the steps until the next one: every parameter's J and the factored blocks.

    Attributes:
        jacobians: J of every layer, by the layer's name.
        blocks: which layers are solved together.
        inverses: the blocks' factors, those of one size together.
        history: rows of J from each of the refreshes whose rows are kept, the newest first.
        damping_L: the α of every block: the one that was factored with K, as the identity holds for no other; after a
            failure α + trace(K) / N.
        asked_L: the α that the settings ask for. `factor` says why ``damping_L`` may be larger.
        divisor_L: what the step of every block divides by: ``damping_L``, and with scaled damping (M17) its ratio to
            the α that is asked for, after earlier failures.
        failures_L: how many factorizations of each block have failed so far.
        moments: those of which D is made (M17), by the names of layer and parameter; none if D is the identity.
        scales: D of the parameters (M17), also of those without J; none if D is the identity.
        spending: the rows and costs of the refresh, by the optimizer's budget; None for a compiled refresh.
        cut: the processes among which parameters are cut; J has the columns of this one's outputs then.
        last_plan: the plan of the last step with this curvature (see `step`), if there was one.
        projected: after a compiled step, the number of steps, and J D⁻¹ m of dense weights then (M19).
    """

    jacobians: Jacobians
    blocks: FisherBlocks
    inverses: Sequence[InverseFactors]
    history: tuple[int, ...]
    damping_L: Tensor
    asked_L: Tensor
    divisor_L: Tensor
    failures_L: Tensor
    moments: AllMoments
    scales: Scales
    spending: Spending | None = None
    cut: Whole | None = None
    last_plan: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    projected: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def shards(self) -> Whole:
        """Return who adds up products with J."""
        return self.cut or WHOLE

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
