"""What an optimizer reports: warnings, each of them once, and the numbers of its last step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.record import Record
from tengrad_triton.curvature.choices import Ops
from tengrad_triton.curvature.target import Target
from tengrad_triton.curvature.woodbury import Bounds, Curvature
from tengrad_triton.inspection.health import bytes_of, pivots_of
from tengrad_triton.kernels.dispatch import rounds_products
from tengrad_triton.optim.options import Unsupported
from tengrad_triton.tuning.budget import Formed, Work
from tengrad_triton.tuning.forecast import Forecaster

_STEP_DEPTH = 5  # stack frames from a warning here up to the caller of `step`


@dataclass(frozen=True)
class Stats:
    """Numbers of a `TENGraD`'s last step. Blocks have the names that they have in its summary.

    Attributes:
        steps: the number of steps taken so far.
        last_refresh: the step, counted from 0, that computed the present curvature; None before the first step.
        age: the number of steps taken with the present curvature.
        interval: the number of steps from one refresh to the next, at present.
        rows: the rows of J that steps use; 0 before the first step, and between the forward of a refresh and its step.
        damping: α of each block, by the block's name; after a factorization that failed, α + trace(K) / N.
        asked: the α that the settings ask for, by the names of those blocks that use a larger one: because rounding
            errors would decide the step with this one, or because factorizations have failed.
        failures: how many factorizations have failed so far.
        pivot: the smallest pivot of the factorization of K + N α I of each block, over N α: at least 1 without
            rounding, and 0 where it failed. Empty where ``rows`` is 0.
        condition: the largest pivot of each block over the smallest: the condition number of K + N α I is no less.
        bytes: of J and the factored matrix of each block.
        share: what the optimizer adds to SGD's step, in the mean over an interval, by the cost model (M18), as a share
            of it; None where it is not known, as after a compiled refresh.
        clip: what `clip_threshold` multiplied the step of each block by, at most 1, by the block's name; empty without
            this bound, before the first step, and after a compiled step, which does not tell.
        trust_region: what the trust region multiplied the step of all blocks by, at most 1; None where ``clip`` would
            be empty.
        actual_change: the change of the loss at the last refreshing step, where the damping is adapted (M8); else None.
        predicted_change: what the quadratic model predicted for that step.
    """

    steps: int
    last_refresh: int | None
    age: int
    interval: int
    rows: int
    damping: Mapping[str, float]
    asked: Mapping[str, float]
    failures: int
    pivot: Mapping[str, float]
    condition: Mapping[str, float]
    bytes: Mapping[str, int]
    share: float | None
    clip: Mapping[str, float]
    trust_region: float | None
    actual_change: float | None
    predicted_change: float | None


class Reports:
    """Warns of what the curvature does not cover, and of losses that the rows are not derivatives of; keeps numbers.

    Args:
        unsupported: whether layers without rows are warned of or refused.

    Attributes:
        apart: for each parameter whose rows at the last refresh did not follow from calls of its layers, by name, how
            they were found, and why.
        bounds: the last step that was not compiled, counted from 0, and what its bounds multiplied it by.
        changes: the actual and the predicted change of the loss at the last refreshing step with adapted damping.
    """

    def __init__(self, unsupported: Unsupported) -> None:
        self._unsupported = unsupported
        self._said: set[str] = set()
        self._checked: tuple[Any, Any] = (None, None)  # the targets and the curvature that `idle` saw last
        self._copied: _Dampings | None = None  # of the last refresh
        self._foreseen = 0  # the most rows for which a refresh was foreseen
        self.apart: dict[str, str] = {}
        self.bounds: tuple[int, Bounds] | None = None
        self.changes: tuple[float, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over: what was said."""
        return {**vars(self), "_checked": (None, None), "_copied": None}

    def stats(self, curvature: Curvature | None, steps: int, age: int, interval: int) -> Stats:
        """Return the numbers of the last step, after ``steps`` of them, ``age`` of them with this curvature."""
        blocks = [block or "." for block in curvature.blocks] if curvature is not None else []
        known = self.bounds is not None and self.bounds[0] == steps - 1
        clip_L, region = self.bounds[1] if self.bounds is not None and known else (None, None)
        actual, predicted = self.changes or (None, None)
        dampings = None if curvature is None else _Dampings.of(curvature)
        pivots = {} if curvature is None else {block or ".": both for block, both in pivots_of(curvature).items()}
        spent = None if curvature is None else curvature.spending
        return Stats(
            steps=steps,
            last_refresh=None if curvature is None else steps - age,
            age=age,
            interval=interval,
            rows=0 if curvature is None else curvature.rows,
            damping={} if dampings is None else dampings.by_block(),
            asked={} if dampings is None else dampings.raised(),
            failures=0 if curvature is None else int(curvature.failures_L.sum()),
            pivot={block: least for block, (least, _) in pivots.items()},
            condition={block: most / least if least else math.inf for block, (least, most) in pivots.items()},
            bytes={} if curvature is None else {block or ".": n for block, n in bytes_of(curvature).items()},
            share=None if spent is None else spent.step + spent.refresh / interval,
            clip={} if clip_L is None else dict(zip(blocks, clip_L.tolist(), strict=True)),
            trust_region=None if region is None else float(region),
            actual_change=actual,
            predicted_change=predicted,
        )

    def uncovered(self, uncovered: Mapping[str, str]) -> None:
        """Warn once about each layer without rows; raise `ValueError` instead with ``unsupported="error"``.

        Args:
            uncovered: for each of these layers, by its name, why it has no rows.
        """
        news = {name: why for name, why in uncovered.items() if name not in self._said}
        if not news:
            return
        listed = "; ".join(f"{name or 'the model'} ({why})" for name, why in news.items())
        if self._unsupported == "error":
            raise ValueError(f"no exact rows for {listed}; with unsupported='sgd' their parameters take the SGD step")
        self._said.update(news)
        warnings.warn(f"no exact rows for {listed}: their parameters take the SGD step", stacklevel=_STEP_DEPTH)

    def idle(self, layers: Sequence[LayerParams], targets: Sequence[Target], curvature: Any, known: Any) -> None:
        """Warn once about each parameter that has a gradient now, but had no part in the last refresh.

        Args:
            layers: of the optimizer.
            targets: the parameters to update.
            curvature: the present curvature. Nothing is checked as long as it and the targets are the same.
            known: by the names of the layers that it covers, the names of their parameters.
        """
        if self._checked[0] is targets and self._checked[1] is curvature:
            return
        self._checked = (targets, curvature)
        covered: Collection[str] = {layer.name for layer in layers if layer.why_sgd is None} - self._said
        missing = [t for t in targets if t.layer in covered and t.param_name not in known.get(t.layer, ())]
        names = (full_name(t.layer, t.param_name) if t.layer in known else t.layer for t in missing)
        idle = [name for name in dict.fromkeys(names) if name not in self._said]
        if idle:
            self._said.update(idle)
            listed = ", ".join(name or "the model" for name in idle)
            warnings.warn(
                f"no rule gave rows of {listed} at the last refresh of the curvature (frozen, not called, or not used "
                "by the output that has rows): their parameters take the SGD step until a refresh that has their rows",
                stacklevel=_STEP_DEPTH - 1,
            )

    def refreshes(self, capture: Capture, model: nn.Module) -> None:
        """Note what is apart, and warn once of each way in which the caller's loss is not the one of the rows."""
        apart = {key: how for record in capture.records for key, how in _ways(record).items()}
        self.apart = {name: apart[key] for key, name in capture.used.names(model, apart).items()}
        if beside := capture.through_output.take():
            names = capture.used.names(model, {id(p) for p in beside})
            listed = ", ".join(names.get(id(p), "?") for p in beside[:3]) + (", …" if len(beside) > 3 else "")
            self._once(
                "beside",
                f"a part of the gradient of {listed} does not come through the output that has rows (but a penalty, an "
                "auxiliary loss, another output, a derivative of the output, or a layer that is called beside the "
                "model): the gradient has that part, but the Fisher matrix has no rows of it",
            )
        why = capture.why_loss_differs()
        if why is not None:
            self._once("loss", f"the loss is not that of the likelihood: {why}")

    def foresees(
        self, ops: Ops, device: torch.device, work: Work, blocks: Sequence[Sequence[str]], formed: Formed, rows: int
    ) -> None:
        """Warn once before a refresh with so many rows that it takes seconds; raise if it does not fit into memory."""
        if rows > self._foreseen:
            message = Forecaster(work, blocks, formed, ops, device).report(rows)
            self._foreseen = rows
            if message is not None:
                self._once("rows", message, deeper=6)

    def refreshed(self, curvature: Curvature) -> None:
        """Warn once where the memory is too small for all rows, and where a damping is larger than asked.

        Of dampings on a GPU a later refresh warns, so that nothing waits for it.
        """
        spending = curvature.spending
        if spending is not None and spending.why.startswith("max_bytes"):
            self._once(
                "bytes",
                f"J of all {spending.of} rows takes more than {spending.why}: {spending.rows} of them, drawn at random "
                "at each refresh, are used; raise max_bytes, or set fisher_rows= or representation= yourself",
            )
        copied = _Dampings.of(curvature)
        seen, self._copied = copied if copied.event is None else self._copied, copied
        if seen is None or not (seen.event is None or seen.event.query()):
            return
        for name, asked in seen.raised().items():
            products = "float32 products"
            if rounds_products(curvature.damping_L.device):
                products = "products in TF32, which torch.set_float32_matmul_precision('highest') turns off,"
            self._once(
                "raised",
                f"block {name!r} uses a damping of {seen.by_block()[name]:.3g}, but {asked:.3g} was asked for: the "
                f"rounding of {products} would decide the step. Raise damping=, or convert the model by "
                "model.double(). stats.asked and stats.damping have all such blocks, at any time",
            )

    def draws_anew(self, device: torch.device) -> None:
        """Warn once that labels are not those that the saved run would have drawn."""
        self._once(
            "generator",
            f"the state was saved on another type of device than {device}, whose random numbers are others: labels and "
            "rows that are drawn from here on are not those of the saved run",
            deeper=-1,
        )

    def _once(self, key: str, message: str, deeper: int = 0) -> None:
        """Warn if it has not yet; ``deeper`` is how many more stack frames there are up to the caller of `step`."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, stacklevel=_STEP_DEPTH + deeper)


@dataclass(frozen=True)
class _Dampings:
    """The dampings that blocks use, and those that the settings ask for.

    Attributes:
        blocks: their names.
        used_L: on the host.
        asked_L: on the host.
        event: when both have come from a GPU; None where they are there.
    """

    blocks: Sequence[str]
    used_L: Tensor
    asked_L: Tensor
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, curvature: Curvature) -> _Dampings:
        """Return them, without waiting for the device."""
        names, numbers = [block or "." for block in curvature.blocks], (curvature.damping_L, curvature.asked_L)
        if numbers[0].device.type != "cuda":
            return cls(names, numbers[0].cpu(), numbers[1].cpu())
        used_L, asked_L = (x.to("cpu", non_blocking=True) for x in numbers)
        event = torch.cuda.Event()
        event.record()
        return cls(names, used_L, asked_L, event)

    def by_block(self) -> dict[str, float]:
        """Return the dampings used."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.blocks, self.used_L.tolist(), strict=True))

    def raised(self) -> dict[str, float]:
        """Return the dampings asked for of those blocks that use larger ones."""
        used = self.by_block()
        asked = dict(zip(self.blocks, self.asked_L.tolist(), strict=True))
        return {name: number for name, number in asked.items() if used[name] > number}


def _ways(record: Record) -> dict[int, str]:
    """Return, for each parameter whose rows do not follow from calls of its layers, by id, how they were found."""
    batched = {key: f"by torch.func in a batched pass: {why}" for key, why in record.unattributed.items()}
    return batched | {key: f"by one backward pass a sample: {why}" for key, why in record.by_backward.items()}
