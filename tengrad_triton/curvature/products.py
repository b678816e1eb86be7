"""The three products with J, for many parameters at once: one kernel launch for all Jacobians that can share it.

Apart from M7 and M12, refreshes and steps compute nothing else with J: gram (K = J Jᵀ), project (J V) and expand
(Jᵀ w, with the update).

Dimensions: L Fisher blocks, N rows of J, R directions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tengrad_triton.curvature.jacobians.base import Jacobian, UpdateState
from tengrad_triton.curvature.jacobians.per_sample import CHUNK_BYTES
from tengrad_triton.curvature.sides import places_of_alike
from tengrad_triton.curvature.target import Target
from tengrad_triton.kernels import ProductLaunches, RepeatedProducts, launch_place, layout_of, may_repeat, runs_kernel


def grams(jacobians: Sequence[Jacobian], blocks: Sequence[int], count: int) -> Tensor:
    """Return k_LNN, the Gram matrix J D⁻¹ Jᵀ of every block: its parameters lie side by side in J, so theirs add up."""
    parts = []
    for some in _some_at_a_time(jacobians, blocks):
        for places in places_of_alike([one.group_key("gram") for one, _ in some]):
            own, of_block = zip(*(some[place] for place in places), strict=True)
            parts.append(own[0].gram_grouped(own, list(of_block), count))
    return sum(parts[1:], start=parts[0])


def _some_at_a_time(jacobians: Sequence[Jacobian], blocks: Sequence[int]) -> Iterable[list[tuple[Jacobian, int]]]:
    """Yield `Jacobian.for_gram` of each, with its block: those that are formed for this in lists of `CHUNK_BYTES`."""
    some, formed = [], 0
    for one, block in zip(jacobians, blocks, strict=True):
        part = one.for_gram()
        some.append((part, block))
        formed += part.nbytes if part is not one else 0
        if formed >= CHUNK_BYTES:
            yield some
            some, formed = [], 0
    if some:
        yield some


class BlockEntry(NamedTuple):
    """One parameter of a Fisher block: its J, the index of its block, and the target of its update."""

    jacobian: Jacobian
    block: int
    target: Target


class ProductPlan:
    """The products with J that a step takes, planned once for all steps with the same J and the same parameters.

    The plan knows which entries share launches, and has views of their parameters and momenta. The steps differ only in
    the gradients, the coefficients w and the dampings.
    """

    def __init__(self, entries: Sequence[BlockEntry], shape: list[int]) -> None:
        """Plan the products of some entries; ``shape`` is [L, N], with the largest number of rows of any block."""
        keys = [
            (one.jacobian.group_key("project"), one.jacobian.group_key("expand"), one.target.nesterov)
            for one in entries
        ]
        self._launches, self._shape = [_Launch(entries, places) for places in places_of_alike(keys)], shape
        self._has_spring = any(one.target.spring for one in entries)
        self._layouts: Sequence[Hashable] = ()  # of the last step's gradients
        self._prepared: tuple[RepeatedProducts | None, list[_Launch]] | None = None  # for such gradients

    def along(
        self,
        grads: Sequence[Tensor],
        scaled: Sequence[Tensor] | None = None,
        once: bool = False,
        projected: Mapping[int, Tensor] | None = None,
    ) -> Products:
        """Return the products of a step.

        Args:
            grads: V of each entry.
            scaled: D⁻¹ V of each entry, which the update takes in place of V and overwrites; None for V itself.
            once: whether it is the only step along such gradients.
            projected: J D⁻¹ V of those entries, by index, for which it is known.
        """
        if projected:
            return Products(None, self._launches, grads, scaled, self._shape, projected)
        if once or not may_repeat(grads[0]) or (scaled is not None and self._has_spring):
            return Products(None, self._launches, grads, scaled, self._shape)
        own = [*map(layout_of, grads)]
        if scaled is not None and [*map(layout_of, scaled)] != own:  # the launches are prepared with V alone
            return Products(None, self._launches, grads, scaled, self._shape)
        layouts = [scaled is None, launch_place(grads[0].device), *own]
        if layouts != self._layouts:
            self._layouts, self._prepared = layouts, None  # this may be the only step before a refresh
            return Products(None, self._launches, grads, scaled, self._shape)
        if self._prepared is None:
            self._prepared = _repeated(self._launches, grads, self._shape, scaled is not None)
        return Products(*self._prepared, grads, scaled, self._shape)


class Products:
    """The products of one step: those of some entries are launched by ``repeated``, the others call ops."""

    def __init__(
        self,
        repeated: RepeatedProducts | None,
        others: Sequence[_Launch],
        grads: Sequence[Tensor],
        scaled: Sequence[Tensor] | None,
        shape: list[int],
        projected: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._repeated, self._shape, self._projected = repeated, shape, projected or {}
        self._others = [(launch, launch.views(grads)) for launch in others]
        self._is_scaled = scaled is not None
        self._scaled = self._others if scaled is None else [(launch, launch.views(scaled)) for launch in others]
        self._read = None if repeated is None else repeated.follow(grads, scaled)

    def project(self) -> Tensor:
        """Return y_LN = J V, summed over the parameters of every block; zeros follow where a block has fewer rows."""
        parts = [
            launch.project(views, self._shape, self._projected)
            for launch, views in self._others
            if any(place not in self._projected for place in launch.places)
        ]
        parts += [self._known()] if self._projected else []
        if self._repeated is not None:
            parts.append(self._repeated.project())
        return sum(parts[1:], start=parts[0])

    def _known(self) -> Tensor:
        """Return the part of y_LN that was given."""
        y_LN = next(iter(self._projected.values())).new_zeros(self._shape)
        blocks = {place: block for one, _ in self._others for place, block in zip(one.places, one.blocks, strict=True)}
        for place, y_N in self._projected.items():
            y_LN[blocks[place], : len(y_N)] += y_N
        return y_LN

    def expand_update_(self, w_LN: Tensor, damping_L: Tensor) -> None:
        """Step every target along (V − Jᵀ w) / damping, with D⁻¹ V in place of V where that is given."""
        if self._repeated is not None:
            self._repeated.expand_update_(w_LN, damping_L)
        if self._others:
            w, dampings = w_LN.unbind(), damping_L.unbind()
            for launch, views in self._scaled:
                launch.expand_update_(views, w, dampings, self._is_scaled)


class _Launch:
    """Entries whose products share a launch; ``places`` are their indices in the plan."""

    def __init__(self, entries: Sequence[BlockEntry], places: list[int]) -> None:
        own = [entries[place] for place in places]
        self.places = places
        self._jacobians, self.blocks = [one.jacobian for one in own], [one.block for one in own]
        self._rows = [one.rows for one in self._jacobians]
        self._operands = self._jacobians[0].operands_of(self._jacobians)
        # A view of the parameter itself would refer to it, and torch swaps no tensor that others refer to.
        self._params = [one.jacobian.view(one.target.parameter.detach()) for one in own]
        self._momenta = [one.jacobian.view(one.target.momentum) for one in own]
        self._settings, self._nesterov = [one.target.settings for one in own], own[0].target.nesterov
        self._has_spring = [bool(one.target.spring) for one in own]

    def views(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the entries' gradients as the ops take them."""
        return [one.view(grads[place]) for one, place in zip(self._jacobians, self.places, strict=True)]

    def project(self, views: list[Tensor], shape: list[int], known: Mapping[int, Tensor]) -> Tensor:
        """Return y_LN without those entries whose part of it is known."""
        at = [at for at, place in enumerate(self.places) if place not in known]
        own, blocks = [self._jacobians[i] for i in at], [self.blocks[i] for i in at]
        operands = self._operands if len(at) == len(views) else own[0].operands_of(own)
        return own[0].project_grouped(operands, [views[i] for i in at], blocks, shape)

    def expand_update_(
        self, views: list[Tensor], w: Sequence[Tensor], dampings: Sequence[Tensor], is_scaled: bool
    ) -> None:
        self._jacobians[0].expand_update_grouped_(self._operands, self._state(views, w, dampings, is_scaled))

    def repeated(
        self, grads: Sequence[Tensor], w_LN: Tensor, damping_L: Tensor, is_scaled: bool
    ) -> ProductLaunches | None:
        """Return the launches of both products, or None where they cannot be repeated."""
        state = self._state(self.views(grads), w_LN.unbind(), damping_L.unbind(), is_scaled)
        if not runs_kernel(*self._operands, *state):
            return None
        launches = self._jacobians[0].launches(self._operands, state, self.blocks)
        return launches if launches is not None and launches.reads_no_copy() else None

    def _state(
        self, views: list[Tensor], w: Sequence[Tensor], dampings: Sequence[Tensor], is_scaled: bool
    ) -> UpdateState:
        momenta = self._momenta
        if is_scaled:  # V is averaged already: only SPRING keeps the direction, elsewhere it goes where V was
            triples = zip(self._momenta, views, self._has_spring, strict=True)
            momenta = [momentum if spring else view for momentum, view, spring in triples]
        own_w = [w[block] for block in self.blocks]
        own_w = [w_N if w_N.shape[0] == n else w_N[:n] for w_N, n in zip(own_w, self._rows, strict=True)]
        numbers = (own_w, [dampings[block] for block in self.blocks], self._settings)
        return UpdateState(self._params, momenta, views, *numbers, self._nesterov)


def _repeated(
    launches: Sequence[_Launch], grads: Sequence[Tensor], shape: list[int], has_scaled: bool
) -> tuple[RepeatedProducts | None, list[_Launch]]:
    """Return the kernel launches for gradients of these layouts, if there are any, and what has to call ops.

    ``has_scaled`` says whether the updates take other tensors than V, of the same layouts.
    """
    w_LN = torch.zeros(shape, dtype=torch.float32, device=grads[0].device)
    damping_L = torch.zeros_like(w_LN[:, 0])
    made = [(one, one.repeated(grads, w_LN, damping_L, has_scaled)) for one in launches]
    groups = [group for _, group in made if group is not None]
    if not groups:
        return None, list(launches)
    places = [place for one, group in made if group is not None for place in one.places]
    repeated = RepeatedProducts(groups, places, grads, w_LN, damping_L, has_scaled)
    return repeated, [one for one, group in made if group is None]
