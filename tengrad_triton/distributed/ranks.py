"""The processes that train one model together: which they are, and what they tell each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tengrad_triton.sharding.shards import all_gathered
from tengrad_triton.sharding.tensors import is_sharded

T = TypeVar("T")
Gram = Literal["global", "local"]
"""Whose rows the curvature has: those of all ranks, or the rank's own."""
GRAMS: tuple[Gram, ...] = ("global", "local")
_SAME = 1e-6  # the relative difference up to which the ranks' sums count as equal


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module within `DistributedDataParallel`, whose names and hooks the optimizer uses, or the model.

    The derivatives for rows must not pass through the output of the wrapper: with ``static_graph=True``, that would
    stop it from averaging gradients, without an error.

    Raises:
        ValueError: the model is a `DataParallel`.
    """
    wrapper = _not_compiled(model)
    if isinstance(wrapper, DataParallel):
        raise ValueError(
            "DataParallel runs copies of the model, which the optimizer does not see: use DistributedDataParallel, "
            "in one process for each device"
        )
    return wrapper.module if isinstance(wrapper, DistributedDataParallel) else model


def _not_compiled(model: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or the model."""
    return getattr(model, "_orig_mod", model)


def check_alone(model: Any, optimizer: str) -> None:
    """Raise if several processes train a model, each with a part of the batch, of which an optimizer knows its own."""
    model = _not_compiled(model)
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"{optimizer} has the samples of one process only, but the model is wrapped in {type(model).__name__}: "
            "give it the model itself, in one process, or use TENGraD"
        )


def group_of(model: nn.Module | None, process_group: Any) -> Any:
    """Return the process group that trains a model: None without one.

    It is the given one, the wrapper's, that of the mesh on which the parameters are, or the default one.

    Raises:
        ValueError: the mesh has other ranks than the given group, or several dimensions, and other ranks than the
            default group.
    """
    wrapper = _not_compiled(model)
    mesh = next((p.device_mesh for p in ([] if wrapper is None else wrapper.parameters()) if is_sharded(p)), None)
    if process_group is None and isinstance(wrapper, DistributedDataParallel):
        process_group = wrapper.process_group
    if process_group is not None:
        ranks = sorted(dist.get_process_group_ranks(process_group))
        if mesh is not None and sorted(mesh.mesh.flatten().tolist()) != ranks:
            raise ValueError(
                f"process_group= has the ranks {ranks}, but the parameters are sharded among "
                f"{sorted(mesh.mesh.flatten().tolist())}: leave it out"
            )
        return process_group
    if mesh is not None and mesh.ndim == 1:
        return mesh.get_group()
    if mesh is not None and mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the parameters are on a mesh of {mesh.size()} ranks with {mesh.ndim} dimensions, among "
            f"{dist.get_world_size()} ranks: pass process_group=, the group of all ranks of the mesh"
        )
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def check_still_alone() -> None:
    """Raise `RuntimeError` if there is a process group by now, which an optimizer does not know."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1:
        raise RuntimeError(
            f"the process group has {count} ranks, but there was none when the optimizer was made, so that it would "
            "take a step for the samples of this rank only: make it after init_process_group (a trainer may call that "
            "as it is made, or as its arguments are)"
        )


class Ranks:
    """The processes of a group. Each method is called by all of them, and returns, or raises, the same on each.

    Args:
        group: the process group.
        gram: whose rows the curvature has.

    Attributes:
        count: R, the number of processes.
        rank: the number of this process, from 0.
        is_default: whether the group is the default one.
    """

    def __init__(self, group: Any, gram: Gram) -> None:
        self._group, self.is_default, self.gram = group, group is dist.group.WORLD, gram
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gathered(self, value: T) -> list[T]:
        """Return what each rank has passed, in the order of the ranks."""
        self._check_size()
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, self._group)
        return values

    def gathered_bytes(self, own: Tensor, most: int) -> Tensor:
        """Return the bytes of each rank [R, most], filled up with zeros, on the device of ``own``."""
        padded = own.new_zeros(most)
        padded[: len(own)] = own
        return all_gathered(padded, self.count, self._group)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one device by their means over the ranks, in one message for each dtype."""
        self._check_size()
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            alike = [x for x in tensors if x.dtype == dtype]
            flat = torch.cat([x.flatten() for x in alike])
            dist.all_reduce(flat, group=self._group)
            flat /= self.count
            parts = flat.split([x.numel() for x in alike])
            torch._foreach_copy_(alike, [part.view(x.shape) for part, x in zip(parts, alike, strict=True)])

    def mean(self, number: float) -> float:
        """Return the mean of a number over the ranks."""
        return math.fsum(self.gathered(number)) / self.count

    def seed(self, seed: int, step: int) -> int:
        """Return the seed of the labels that this rank draws for the refresh of a step: a different one on each."""
        return (seed + 0x9E3779B97F4A7C15 * (step * self.count + self.rank)) % 2**63

    def _check_size(self) -> None:
        if self.is_default:  # which may be another one by now
            self._group = dist.group.WORLD if dist.is_initialized() else None
        if (now := 0 if self._group is None else self._group.size()) != self.count:
            raise RuntimeError(
                f"the process group has {now} ranks, but had {self.count} when the optimizer was made: make a new "
                "optimizer, and load the state of this one into it"
            )


def agree(ranks: Ranks, model: nn.Module, settings: Mapping[str, Any], seed: int) -> int:
    """Compare model and settings of all ranks; return the seed of the first one, which all of them use.

    Raises:
        ValueError: they differ. Every rank raises, and says in what.
    """
    parameters = {name: f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters()}
    said = {**{f"parameter {name!r}": text for name, text in parameters.items()}, **map_repr(settings)}
    of_ranks = ranks.gathered((said, seed))
    first = of_ranks[0][0]
    for rank, (other, _) in enumerate(of_ranks):
        differ = [key for key in {**first, **other} if first.get(key, "none") != other.get(key, "none")]
        if differ:
            shown = "; ".join(
                f"{key}: {first.get(key, 'none')} on rank 0, {other.get(key, 'none')} on rank {rank}"
                for key in differ[:3]
            )
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ValueError(f"the ranks need the same model and the same settings, but differ in {shown}{more}")
    return of_ranks[0][1]


def settings_of_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the present settings of parameter groups, and how many parameters they have, by names for messages."""

    def plain(name: str, value: Any) -> Any:
        if name == "params":
            return len(value)
        return value.item() if isinstance(value, Tensor) else value

    named = [(index, name, value) for index, group in enumerate(groups) for name, value in group.items()]
    return {f"{name} of group {index}": plain(name, value) for index, name, value in named}


def map_repr(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as texts that can be compared between processes: objects by their types."""
    plain = (str, int, float, bool, type(None), tuple, list, dict)
    return {name: repr(x) if isinstance(x, plain) else type(x).__qualname__ for name, x in settings.items()}


@dataclass(frozen=True)
class Meeting:
    """What each rank says at the beginning of a refresh.

    Attributes:
        step: the number of steps taken.
        samples: how many samples it has.
        sums: the sums of the sizes of the entries of its parameters, and of its gradients.
        settings: the present settings of its parameter groups, by name, as texts.
        unused: the parameters that its forwards did not use, where that has to be the same; None if it is not known.
    """

    step: int
    samples: int
    sums: tuple[float, ...]
    settings: Mapping[str, str]
    unused: tuple[str, ...] | None = None


def meeting_of(
    step: int,
    samples: int,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    unused: Sequence[str] | None,
) -> Meeting:
    """Return what this rank says."""
    sums, settings = tuple(map(_size_of, (parameters, grads))), map_repr(settings_of_groups(groups))
    return Meeting(step, samples, sums, settings, None if unused is None else tuple(unused))


def meet(ranks: Ranks, own: Meeting) -> int:
    """Compare the ranks at the beginning of a refresh, and return the number of samples of all of them.

    Raises:
        RuntimeError: they are at different steps, or have different settings, parameters or gradients. Every rank
            raises.
    """
    all_of_them = ranks.gathered(own)
    first = all_of_them[0]
    _check_uses(all_of_them)
    for rank, other in enumerate(all_of_them):
        why = _difference(first, other)
        if why is not None:
            raise RuntimeError(f"rank {rank} differs from rank 0: {why}")
    return sum(one.samples for one in all_of_them)


def _check_uses(all_of_them: Sequence[Meeting]) -> None:
    known = [(rank, set(one.unused)) for rank, one in enumerate(all_of_them) if one.unused is not None]
    for rank, unused in known[1:]:
        differ = sorted(unused ^ known[0][1])
        if differ:
            one, other = (rank, known[0][0]) if differ[0] in unused else (known[0][0], rank)
            raise RuntimeError(
                f"rank {one} did not use {differ[0]!r}, which rank {other} did: fully_shard then adds up gradients of "
                "different parameters, without an error. Let every rank use all of them, or call "
                "model.set_reduce_scatter_unused_params(True) (torch 2.13 or later) before the first backward"
            )


def _size_of(tensors: Sequence[Tensor]) -> float:
    if not tensors:
        return 0.0
    return float(torch.stack([x.sum(dtype=torch.float64) for x in torch._foreach_norm(list(tensors), 1)]).sum())


def _difference(first: Meeting, other: Meeting) -> str | None:
    if first.step != other.step:
        return f"it has taken {other.step} steps, and rank 0 {first.step}: every rank takes every step"
    for name, value in first.settings.items():
        if other.settings.get(name) != value:
            return f"its {name} is {other.settings.get(name)}, that of rank 0 {value}: every rank has the same settings"
    same_parameters, same_grads = (
        math.isclose(x, y, rel_tol=_SAME) or not (math.isfinite(x) or math.isfinite(y))
        for x, y in zip(first.sums, other.sums, strict=True)
    )
    if not same_parameters:
        return (
            f"the sizes of its parameters add up to {other.sums[0]:.9g}, those of rank 0 to {first.sums[0]:.9g}: begin "
            "with the same parameters, as DistributedDataParallel does"
        )
    if not same_grads:
        return (
            f"the sizes of its gradients add up to {other.sums[1]:.9g}, those of rank 0 to {first.sums[1]:.9g}: "
            "average the gradients before the step, as DistributedDataParallel does in a backward outside of no_sync()"
        )
    return None
