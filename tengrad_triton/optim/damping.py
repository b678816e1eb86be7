"""Damping that changes during training: by a function of the step, or by the method of Levenberg and Marquardt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.target import Target
from tengrad_triton.optim.validation import check_number

Schedule = Callable[[int], float]
"""A function from the number of steps taken so far to the damping."""


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that is adapted at every refresh (Martens 2010, section 4.1; docs/math.md, M8).

    ρ = ΔL / ΔM is the ratio of a step's actual change of the loss, ΔL, and the change ΔM that the quadratic model
    predicted. If ΔM < 0 and ρ > 3/4, the setting ``damping`` is multiplied by ``decrease``. If ΔM ≥ 0, ρ < 1/4 or ρ is
    not a number, it is multiplied by ``increase``. The new damping takes effect at the next refresh.

    Use it with ``scaling="none"``, where a larger damping makes steps shorter. With scaled damping a smaller one does:
    shorter steps are predicted better, so the damping falls further, and training stops.

    Args:
        start: the first damping, positive; a hundredth of the default of scaled damping.
        decrease: the multiplier after a well predicted step, in (0, 1].
        increase: the multiplier after a badly predicted step, at least 1.
        least: the smallest damping.
        most: the largest damping.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is no number.
    """

    start: float = 0.1
    decrease: float = 2 / 3
    increase: float = 3 / 2
    least: float = 1e-8
    most: float = 1e4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value)
        if not 0 < self.least <= self.start <= self.most < math.inf:
            raise ValueError(f"expected 0 < least <= start <= most, got {self.least}, {self.start}, {self.most}")
        if not 0 < self.decrease <= 1 <= self.increase < math.inf:
            raise ValueError(f"expected 0 < decrease <= 1 <= increase, got {self.decrease} and {self.increase}")

    def adapted(self, damping: float, actual: float, predicted: float) -> float:
        """Return the next damping.

        Args:
            damping: the present one.
            actual: ΔL, by how much the step changed the loss, in its units; below 0 where it fell.
            predicted: ΔM, by how much the quadratic model expected it to change.
        """
        ratio = actual / predicted if predicted else math.nan
        if ratio > 0.75 and predicted < 0:
            return max(self.least, self.decrease * damping)
        if ratio >= 0.25 and predicted < 0:
            return damping
        return min(self.most, self.increase * damping)


Damping = float | Schedule | Literal["lm"] | LevenbergMarquardt
"""The setting ``damping`` of `TENGraD`."""
DampingSchedule = Schedule | LevenbergMarquardt
"""How a damping changes during training."""


def schedule_of(damping: Any) -> tuple[DampingSchedule | None, Any]:
    """Return the schedule of a setting ``damping``, or None for a constant, and the group's first damping.

    If the setting is a function, the second result is that function too: the caller evaluates it.
    """
    schedule = LevenbergMarquardt() if isinstance(damping, str) and damping == "lm" else damping
    if isinstance(schedule, LevenbergMarquardt):
        return schedule, schedule.start
    return (schedule, schedule) if callable(schedule) else (None, damping)


def adapts(schedules: Sequence[DampingSchedule | None]) -> bool:
    """Whether some group's damping is adapted by `LevenbergMarquardt`."""
    return any(isinstance(schedule, LevenbergMarquardt) for schedule in schedules)


def adapt_dampings(
    groups: Sequence[dict[str, Any]],
    schedules: Sequence[DampingSchedule | None],
    predicted: float,
    loss: Any,
    closure: Callable[[], Any],
    capture: Capture,
    mean: Callable[[float], float],
) -> float:
    """Adapt the damping of the groups with `LevenbergMarquardt` to a step's change of the loss; return that change.

    ``predicted`` is the predicted change, ``loss`` the loss before the step; the closure evaluates it after the step,
    without the hooks of the capture. ``mean`` returns the mean of a number over all processes.
    """
    capture.disarm()
    try:
        with torch.enable_grad():
            actual = mean(_number_of(closure()) - _number_of(loss))
    except Exception:
        capture.arm()  # the refresh is still due
        raise
    for group, schedule in zip(groups, schedules, strict=True):
        if isinstance(schedule, LevenbergMarquardt):
            sign = -1 if group["maximize"] else 1
            group["damping"] = schedule.adapted(group["damping"], sign * actual, predicted)
    return actual


def damping_of(
    blocks: Mapping[str, Sequence[str]],
    layers: Sequence[LayerParams],
    groups: Sequence[Mapping[str, Any]],
    schedules: Sequence[DampingSchedule | None],
    device: torch.device,
) -> Tensor:
    """Return the present damping of each block; the other arguments are those of `check_dampings`, which raises first.

    Fill kernels write the numbers, in float64: a copy from the host would wait for the device.
    """
    check_dampings(blocks, layers, groups, schedules)
    group_of = {layer.name: next(iter(layer.groups.values())) for layer in layers}
    numbers = [groups[group_of[names[0]]]["damping"] for names in blocks.values()]
    filled = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
    return torch.stack(filled) if filled else torch.empty(0, dtype=torch.float64, device=device)


def check_dampings(
    blocks: Mapping[str, Sequence[str]],
    layers: Sequence[LayerParams],
    groups: Sequence[Mapping[str, Any]],
    schedules: Sequence[DampingSchedule | None],
) -> None:
    """Raise unless all parameters of each block have the same damping, which is adapted alike where it is adapted.

    All else may differ within a block: the block's F + α I has no other setting.

    Args:
        blocks: the names of the layers that are solved together, by the name of their block.
        layers: of the optimizer.
        groups: the optimizer's parameter groups, with the present dampings.
        schedules: one of each group.
    """
    indices_of = {layer.name: set(layer.groups.values()) for layer in layers}
    for block, names in blocks.items():
        indices = sorted({index for name in names for index in indices_of[name]})
        dampings = {groups[index]["damping"] for index in indices}
        if len(dampings) > 1:
            raise ValueError(
                f"the parameters of block {block!r} are solved together and need one damping, got "
                f"{', '.join(map(str, sorted(dampings)))}: give their parameter groups the same"
            )
        if len({_adaptation(groups[index], schedules[index]) for index in indices}) > 1:
            raise ValueError(
                f"the parameters of block {block!r} are solved together, but their groups' dampings are adapted in "
                "different ways: give these groups the same damping='lm' and the same maximize"
            )


def _adaptation(group: Mapping[str, Any], schedule: DampingSchedule | None) -> tuple[LevenbergMarquardt, bool] | None:
    """Return what the adaptation of a group's damping depends on; None where it is not adapted."""
    return (schedule, bool(group["maximize"])) if isinstance(schedule, LevenbergMarquardt) else None


def _number_of(loss: Any) -> float:
    """Return a closure's loss as a number; a tensor may still have a graph."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


@contextmanager
def restored_on_error(targets: Sequence[Target]) -> Iterator[None]:
    """Give parameters and momenta the values back that they have now, if an error leaves the context.

    That takes a copy of them, so it is for steps that call the user's code after their update.
    """
    updated = [x.detach() for target in targets for x in (target.parameter, target.momentum)]
    before = [x.clone() for x in updated]
    try:
        yield
    except Exception:
        torch._foreach_copy_(updated, before)
        raise
