"""How many rows of J a budget pays for, and how often they are refreshed (docs/math.md, M18).

All costs are flops by the cost model (`Geometry`): a pass over memory counts as the flops that it takes the time of.
Dimensions: N samples of a batch, P positions, R rows of J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from tengrad_triton.capture.blocks import full_name
from tengrad_triton.curvature.choices import Representation
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.curvature.geometry import EMBEDDING, Geometry, Spending
from tengrad_triton.curvature.moments import AllMoments
from tengrad_triton.curvature.woodbury import FisherBlocks
from tengrad_triton.tuning.plan import Given, Plan

_SGD_PASSES = 5  # over a weight: it, its gradient and its momentum are read, two of them written
_SCALE_PASSES = 10  # over a weight: three each for the mean, the look-ahead and D⁻¹ V̂, and one for the norm of that
_EIGENVECTORS = 25  # n³ times this are the flops of the eigenvectors of a matrix of n entries
Sizes = Mapping[str, Geometry]
Chosen = Mapping[str, Representation]
Formed = Callable[[int], tuple[Sizes, Chosen]]
"""From a number of rows to the sizes and the representations of every parameter."""


@dataclass(frozen=True)
class Work:
    """What a refresh could use, all rows of it, and what SGD does with the same batch.

    Attributes:
        weights: the sizes of every parameter, with R the rows of the whole refresh; also those whose rows are explicit.
        samples: N.
        backwards: the backward passes that the rows take beside the caller's.
        history: the refreshes whose rows are kept.
        sides: for each parameter the sides of D that are matrices, by their entries in every group; none without D.
        blocks: the number of Fisher blocks.
    """

    weights: Mapping[str, Geometry]
    samples: int
    backwards: int
    history: int
    sides: Mapping[str, tuple[int, ...]]
    blocks: int

    @property
    def rows(self) -> int:
        """The rows of the whole refresh."""
        return next((geometry.samples for geometry in self.weights.values()), 0)

    @property
    def sgd(self) -> float:
        """The flops of SGD's step: 6 N P for each entry of a weight, and passes over it."""
        return sum(
            (0 if g.layout == EMBEDDING else 6 * self.samples * g.positions * g.entries)
            + _SGD_PASSES * g.flops_of_pass(g.itemsize * g.entries)
            for g in self.weights.values()
        )

    @property
    def scale(self) -> float:
        """The flops of V̂ and D⁻¹ V̂."""
        return sum(
            2 * sum(self.sides[name]) * g.entries + _SCALE_PASSES * g.flops_of_pass(g.itemsize * g.entries)
            for name, g in self.weights.items()
            if name in self.sides
        )

    def of_rows(self, rows: int) -> dict[str, Geometry]:
        """Return the sizes of J with some of the rows of each refresh."""
        rows *= self.history
        return {
            name: replace(g, samples=rows, factored_bytes=g.factored_bytes * rows // max(1, g.samples))
            for name, g in self.weights.items()
        }

    def step(self, sizes: Sizes, chosen: Chosen) -> float:
        """Return the flops that J in these forms, and D, add to every step."""
        return self.scale + sum(g.step_flops(chosen[name]) for name, g in sizes.items())

    def refresh(self, rows: int, sizes: Sizes, chosen: Chosen) -> float:
        """Return the flops that a refresh with some of the rows, of these sizes, adds to a step."""
        backward = 4 * self.backwards * sum(self.samples * g.positions * g.entries for g in self.weights.values())
        grams = sum(g.refresh_flops(chosen[name]) for name, g in sizes.items())
        scaled = sum(  # rows that are stored are multiplied once more for K
            2 * sum(sides) * sizes[name].samples * sizes[name].entries
            for name, sides in self.sides.items()
            if chosen[name] != "factored"
        )
        moments = sum(
            n * n * (8 * self.samples * self.weights[name].positions + _EIGENVECTORS * n) * self.weights[name].groups
            for name, sides in self.sides.items()
            for n in sides
        )
        return backward + grams + scaled + moments + self.blocks * (self.history * rows) ** 3


@dataclass(frozen=True)
class Chooser:
    """The choices of an optimizer for other numbers of rows.

    Attributes:
        plan: of the device.
        given: the representations that the user chose.
        explicit: the names of parameters whose rows are given, which leaves no choice.
        refresh_every: the number of steps that share the time of a refresh.
        max_bytes: the memory for J, in bytes.
    """

    plan: Plan
    given: Given
    explicit: Collection[str]
    refresh_every: int
    max_bytes: int

    def representations(self, sizes: Sizes) -> Chosen:
        """Return that of every parameter."""
        choices = self.plan.choose(self._chosen(sizes), self.given, self.refresh_every, self.max_bytes)
        chosen = {name: choice.representation for name, choice in choices.items()}
        return {**chosen, **dict.fromkeys(self.explicit, "per_sample")}

    def stored_bytes(self, sizes: Sizes, chosen: Chosen) -> int:
        """Return the bytes that ``max_bytes`` bounds; 0 if the user chose all representations."""
        own = self._chosen(sizes)
        if self.given is not None and (isinstance(self.given, str) or own.keys() <= self.given.keys()):
            return 0
        return self.plan.stored_bytes(own, {name: chosen[name] for name in own})

    def _chosen(self, sizes: Sizes) -> dict[str, Geometry]:
        return {name: geometry for name, geometry in sizes.items() if name not in self.explicit}


@dataclass(frozen=True)
class Budget:
    """What the optimizer may spend.

    Attributes:
        step_share: what the optimizer may add to SGD's step, as a share of it: one half for every step's products, the
            other one for refreshes, in the mean. None for no bound.
        max_bytes: the memory for J, in bytes.
        fisher_rows: the most rows; None for no bound.
    """

    step_share: float | None
    max_bytes: int
    fisher_rows: int | None

    @property
    def side_share(self) -> float | None:
        """The share of SGD's step that each matrix of D may take: an eighth of the whole. None for no bound."""
        return None if self.step_share is None else self.step_share / 8

    def spend(self, work: Work, chooser: Chooser, before: Spending | None = None) -> Spending:
        """Return the most rows within the budget.

        What the refresh ``before`` spent stays for a smaller batch, such as the last one of an epoch: as many rows.

        Raises:
            ValueError: not even one row is within the budget.
        """
        if not work.weights:
            return Spending(0, 0, 0.0, 0.0, 1, "")
        if before is not None and work.rows < before.of:
            return before
        most = work.rows if self.fisher_rows is None else min(work.rows, self.fisher_rows)
        rows, why = most, "" if most == work.rows else f"fisher_rows={self.fisher_rows}"
        formed = cache(partial(_formed, work, chooser))
        bounds = {
            "step_share": lambda r: self.step_share is None or work.step(*formed(r)) <= self.step_share / 2 * work.sgd,
            "max_bytes": lambda r: chooser.stored_bytes(*formed(r)) <= self.max_bytes,
        }
        for name, fits in bounds.items():
            fitting = largest_that(rows, fits)
            if fitting == 0:
                raise ValueError(self._no_row(name, work, chooser))
            if fitting < rows:
                rows, why = fitting, f"{name}={getattr(self, name):g}"
        refresh = work.refresh(rows, *formed(rows)) / work.sgd
        interval = 1 if self.step_share is None else max(1, math.ceil(2 * refresh / self.step_share))
        return Spending(rows, work.rows, work.step(*formed(rows)) / work.sgd, refresh, interval, why)

    def _no_row(self, name: str, work: Work, chooser: Chooser) -> str:
        one = _formed(work, chooser, 1)
        if name == "max_bytes":
            stored = f"{chooser.stored_bytes(*one):,}"
            return f"max_bytes={self.max_bytes} leaves no row of J: one row takes {stored} bytes; set at least that"
        least = replace(work, sides=dict.fromkeys(work.sides, ())).step(*one) / work.sgd
        # A larger share also pays for matrices in D: for at most two a weight, of `side_share` or a twelfth each.
        enough = min(4 * least, 2 * least + 1 / 3) if work.sides else 2 * least
        without = ", or use TENGraD.unscaled, which needs less" if work.sides else ""
        return (
            f"step_share={self.step_share:g} leaves no row of J: by the cost model one row adds {least:.3f} to SGD's "
            f"step, for which half of the share is meant; step_share={math.ceil(1e3 * enough) / 1e3:g} is enough"
            f"{without}"
        )


def _formed(work: Work, chooser: Chooser, rows: int) -> tuple[Sizes, Chosen]:
    sizes = work.of_rows(rows)
    return sizes, chooser.representations(sizes)


def largest_that(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to ``most`` that fits, by bisection; 0 if none does."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Spender:
    """Returns what a refresh of the optimizer spends.

    Args:
        budget: what may be spent.
        plan: of the device.
        given: the representations that the user chose.
        refresh_every: the number of steps that share the time of a refresh.
        samples: N.
        history: the refreshes whose rows are kept.
        draws: whether the rows take backward passes of their own.
        foresee: is told of the refresh before it is made: what it could use, the full names of the parameters of each
            Fisher block, what is formed of a number of rows, and how many are kept.
    """

    def __init__(
        self, budget: Budget, plan: Plan, given: Given, refresh_every: int, samples: int, history: int, draws: bool,
        foresee: Callable[[Work, Sequence[Sequence[str]], Formed, int], None],
    ) -> None:  # fmt: skip
        self._budget, self._samples, self._history, self._draws = budget, samples, history, draws
        self._foresee = foresee
        self._chooser = partial(Chooser, plan, given, refresh_every=refresh_every, max_bytes=budget.max_bytes)

    def __call__(
        self, contributions: Contributions, moments: AllMoments, blocks: FisherBlocks, before: Spending | None
    ) -> Spending:
        """Return what the budget pays for.

        Args:
            contributions: to all rows of the refresh.
            moments: of which D is made; none without scaling.
            blocks: the Fisher blocks.
            before: what the last refresh spent, if there was one.

        Raises:
            ValueError: the budget leaves no row, or the refresh does not fit into memory.
        """
        explicit = contributions.explicit()
        weights = {**contributions.geometries(), **explicit}
        sides = {
            full_name(layer, name): tuple(x.shape[1] for x in (own.rows, own.columns) if x.dim() == 3)
            for layer, parameters in moments.items()
            for name, own in parameters.items()
            if full_name(layer, name) in weights
        }
        backwards = contributions.rows // max(1, self._samples) if self._draws else 0
        work = Work(weights, self._samples, backwards, self._history, sides, len(blocks))
        chooser = self._chooser(explicit=explicit.keys())
        spending = self._budget.spend(work, chooser, before)
        names = [
            [full_name(x, name) for x in layers for name in contributions.by_layer[x]] for layers in blocks.values()
        ]
        self._foresee(work, names, partial(_formed, work, chooser), min(spending.rows, work.rows))
        return spending
