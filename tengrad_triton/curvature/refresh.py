"""A refresh of the curvature: from captured batches to every parameter's J and the factored Fisher blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.choices import Choice, Choices, Ops, OpsFor, Representation
from tengrad_triton.curvature.concat import MicroBatches, concat_embedding, concat_outer
from tengrad_triton.curvature.contributions import Contributions, gather
from tengrad_triton.curvature.geometry import Geometry, Spending, geometry_of
from tengrad_triton.curvature.jacobians.base import Jacobian, Jacobians, LayerJacobian
from tengrad_triton.curvature.jacobians.embedding import EmbeddingJacobian
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.jacobians.no_entries import NoEntries
from tengrad_triton.curvature.jacobians.per_sample import PerSample
from tengrad_triton.curvature.moments import AllMoments, Grads, Scaling, scales_of, updated_moments
from tengrad_triton.curvature.scaling import Multiplier, Scale, Scales, explicit_rows
from tengrad_triton.curvature.shards.cut import CoupledScale, Cut, cut_calls, cuts_of
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks, factor
from tengrad_triton.kernels.dispatch import widen
from tengrad_triton.layers import EmbeddingGrads, OuterProducts, PerSampleGrads, tensors_in
from tengrad_triton.profiling import phase
from tengrad_triton.sharding.shards import WHOLE, Whole


@dataclass(frozen=True)
class RefreshOptions:
    """The settings of the optimizer that a refresh needs.

    Attributes:
        spend: returns what the refresh spends, above all how many rows it keeps, from all of them, the moments, the
            Fisher blocks, and what the last refresh spent: `Options.spender`.
        side_share: what a matrix of D may cost in a step, as a share of SGD's (`updated_moments`).
        history: the number of refreshes whose rows are kept.
        tol: the error bound of ``"compressed"`` (M7).
        relative_damping: whether dampings are in units of each block's mean squared row norm (M5).
        scaling: what D is in F + α D (M17).
        release_calls: whether captured calls are dropped as J takes their place (see `gather`).
        choose: returns every weight's choice from the sizes of all weights: `Options.choose`. For a weight without a
            plan the cost model decides (`Geometry`); a bias has no choice, and keeps its rows.
        blocks_of: returns the Fisher blocks that the named layers form: `fisher_blocks_of` (M11).
        damping_of: returns the present setting ε of each block as a tensor (M5).
        ops_for: returns the ops for kernel overrides: `choices.ops_for`.
        report: takes the reason of every layer without rows, by the layer's name; warns or raises.
        gather: returns what was captured, and why layers have none: `contributions.gather`, of one or of all ranks.
        shards: the processes among which parameters are cut.
    """

    spend: Callable[[Contributions, AllMoments, FisherBlocks, Spending | None], Spending]
    side_share: float | None
    history: int
    tol: float
    relative_damping: bool
    scaling: Scaling
    release_calls: bool
    choose: Callable[[Mapping[str, Geometry]], dict[str, Choice]]
    blocks_of: Callable[[Sequence[str]], FisherBlocks]
    damping_of: Callable[[FisherBlocks], Tensor]
    ops_for: OpsFor
    report: Callable[[Mapping[str, str]], None]
    gather: Callable[[Sequence[LayerParams], Capture, bool], tuple[Contributions, dict[str, str]]] = gather
    shards: Whole = WHOLE


def refresh(
    capture: Capture,
    layers: Sequence[LayerParams],
    options: RefreshOptions,
    before: Curvature | None,
    grads: Grads,
    generator: torch.Generator,
) -> Curvature:
    """Return the curvature of what was captured since the last step.

    Args:
        capture: holds the records of the layers' calls.
        layers: of the optimizer.
        options: of the refresh.
        before: the present curvature, for its history, its moments and its count of failures.
        grads: V of the parameters that the step updates.
        generator: draws which rows are kept where the budget does not pay for all.

    Raises:
        RuntimeError: nothing was captured since the last step.
        ValueError: a rule returned rows of another size than its parameter, or the budget leaves no row.
    """
    with phase("capture"):
        contributions, missing = options.gather(layers, capture, options.release_calls)
    options.report(missing)
    with phase("curvature"):
        known = {} if before is None else before.moments
        # D is that of all rows, also of those that J does without.
        of_d = (options.scaling, options.side_share, options.shards)
        moments = updated_moments(known, contributions, layers, grads, *of_d)
    contributions, blocks = replace(contributions, parts=options.shards.count), options.blocks_of(contributions.layers)
    spending = options.spend(contributions, moments, blocks, None if before is None else before.spending)
    contributions = contributions.sample(spending.rows, generator)
    choices, rows = options.choose(contributions.geometries()), contributions.rows
    compressed = compressed_layers(contributions, choices)
    tol = {block: options.tol for block, names in blocks.items() if compressed.intersection(names)}
    with phase("curvature"):
        scales = scales_of(moments, layers)
        own = jacobians_of(contributions, choices, options.ops_for, scales, cuts_of(layers, options.shards))
        jacobians, history = append_history(own, rows, before, options.history)
        failures_L = failures_of(list(blocks), before)
        curvature = factor(
            jacobians, blocks, history, options.damping_of(blocks), failures_L, options.ops_for(()),
            tol, options.relative_damping, moments, scales, options.shards,
        )  # fmt: skip
    return replace(curvature, spending=spending)


def jacobians_of(
    contributions: Contributions,
    choices: Choices,
    ops_for: OpsFor,
    scales: Scales,
    cuts: Mapping[str, Mapping[str, Cut]] | None = None,
) -> dict[str, LayerJacobian]:
    """Return every layer's J, each parameter in the representation and with the kernels chosen for it.

    With ``scales`` it is J D⁻¹ (M17). With ``cuts`` it is that of this process's outputs.

    ``contributions`` is emptied: a layer's inputs are freed as soon as its J is there, unless J consists of them.
    """
    known: dict[tuple[str, ...], Ops] = {}  # to make the ops takes longer than a small layer's arithmetic

    def of_layer(name: str) -> LayerJacobian:
        layer, own, jacobians = contributions.by_layer.pop(name), scales.get(name, {}), {}
        for param_name, batches in layer.items():
            choice = choices.get(full_name(name, param_name), Choice("per_sample", ()))
            ops, scale = known.get(choice.kernel_overrides), own.get(param_name)
            if ops is None:
                ops = known[choice.kernel_overrides] = ops_for(choice.kernel_overrides)
            arguments = batches, choice.representation, ops, scale
            own_cut = None if cuts is None else cuts[name][param_name]
            jacobians[param_name] = jacobian_of(*arguments) if own_cut is None else _own_jacobian(*arguments, own_cut)
        return jacobians

    return {name: of_layer(name) for name in contributions.layers}


def jacobian_of(
    batches: MicroBatches, representation: Representation, ops: Ops, scale: Scale | None = None
) -> Jacobian:
    """Return the J of one parameter: calls within a micro-batch add up, micro-batches follow each other.

    With a ``scale`` D it is J D⁻¹.
    """
    by = None if scale is None else scale.inverse
    kinds = {type(call) for calls in batches for call in calls}
    outers = [[call for call in calls if isinstance(call, OuterProducts)] for calls in batches]
    if EmbeddingGrads in kinds and PerSampleGrads not in kinds and representation == "factored":
        embeddings = [[call for call in calls if isinstance(call, EmbeddingGrads)] for calls in batches]
        linear = concat_outer(outers) if OuterProducts in kinds else None
        embedding = concat_embedding(embeddings)
        if by is not None:
            embedding, linear = by.of_embedding(embedding), linear and by.of_outer_products(linear)
        return EmbeddingJacobian(embedding, linear, ops, scale)
    if kinds == {OuterProducts}:
        # A J that will be compressed stays factored until then, where K is cheaper from factors.
        compressible = representation == "compressed" and not geometry_of(outers[0][0]).prefers_explicit_rows
        if representation == "factored" or compressible:
            factors = concat_outer(outers)
            return Factored(factors if by is None else by.of_outer_products(factors), ops, scale)
    rows = [_sum([explicit_rows(call, ops, by) for call in calls]) for calls in batches]
    j_NK = rows[0] if len(rows) == 1 else torch.cat(rows)  # torch.cat would copy a single tensor
    if representation == "per_sample_bf16":  # K is that of the rounded rows
        return PerSample(j_NK.bfloat16(), ops, "samples", scale)
    return PerSample(j_NK, ops, "samples", scale, _factors_for_gram(outers, kinds, by))


def _factors_for_gram(
    outers: Sequence[Sequence[OuterProducts]], kinds: Collection[type], by: Multiplier | None
) -> OuterProducts | None:
    """Return the factors where K takes fewer flops from them than from rows; they are no larger than rows then."""
    if by is None or kinds != {OuterProducts} or not by.prefers_factors(outers[0][0]):
        return None
    return concat_outer(outers)


def _own_jacobian(
    batches: MicroBatches, representation: Representation, ops: Ops, scale: Scale | None, cut: Cut
) -> Jacobian:
    """Return the J of those outputs of one parameter that this process has.

    bfloat16 takes float32 where D couples processes: K and J would come from rows that are rounded differently.
    """
    own_scale = None if scale is None else cut.of_scale(scale)
    if cut.is_empty:
        like = widen(next(iter(tensors_in(vars(batches[0][0])))))
        return NoEntries(sum(calls[0].samples for calls in batches), like.new_empty(0), ops, own_scale)
    if scale is None or not isinstance(own_scale, CoupledScale):
        return jacobian_of(cut_calls(batches, cut, ops, None), representation, ops, own_scale)
    if representation == "per_sample_bf16":
        representation = "per_sample"
    by_inverse, by_root = scale.inverse, scale.root(of_inverse=True)
    own, for_k = (jacobian_of(cut_calls(batches, cut, ops, by), representation, ops) for by in (by_inverse, by_root))
    return replace(cast("Any", own), scale=own_scale, for_k=for_k)


def _sum(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.stack(tuple(rows)).sum(0)


def append_history(
    jacobians: Jacobians, rows: int, before: Curvature | None, history: int
) -> tuple[Jacobians, tuple[int, ...]]:
    """Return J with the rows of earlier refreshes behind its own (M10), and how many rows each refresh gave.

    Where a layer, a size or a representation has changed, the history begins anew.
    """
    older = () if before is None else before.history[: history - 1]
    if before is None or not older or _param_names(jacobians) != _param_names(before.jacobians):
        return jacobians, (rows,)
    joined = {
        name: {
            param_name: own.append_history(before.jacobians[name][param_name], sum(older))
            for param_name, own in layer.items()
        }
        for name, layer in jacobians.items()
    }
    if any(one is None for layer in joined.values() for one in layer.values()):
        return jacobians, (rows,)
    return cast("Jacobians", joined), (rows, *older)


def _param_names(jacobians: Jacobians) -> dict[str, set[str]]:
    return {name: set(layer) for name, layer in jacobians.items()}


def compressed_layers(contributions: Contributions, choices: Choices) -> set[str]:
    """Return the layers with a weight that is to be compressed."""
    compressed = {name for name, choice in choices.items() if choice.representation == "compressed"}
    by_layer = contributions.by_layer.items()
    return {name for name, layer in by_layer if any(full_name(name, param_name) in compressed for param_name in layer)}


def failures_of(blocks: Sequence[str], before: Curvature | None) -> Tensor:
    """Return how many factorizations of the named blocks have failed before."""
    counts = {} if before is None else dict(zip(before.blocks, before.failures_L.unbind(), strict=True))
    zero = next((count.new_zeros(()) for count in counts.values()), torch.zeros(()))
    return torch.stack([counts.get(block, zero) for block in blocks]) if blocks else torch.empty(0)
