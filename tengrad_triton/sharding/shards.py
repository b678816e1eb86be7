"""What the processes that have parts of the same parameters add up and gather.

A parameter is cut along its first dimension, its outputs, as `torch.chunk` cuts: ⌈O / R⌉ for each of R ranks, fewer or
none for the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tengrad_triton.sharding.modules import sharded_modules
from tengrad_triton.sharding.tensors import is_sharded

# Before torch 2.13 it has the second name.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def all_gathered(own: Tensor, count: int, group: Any) -> Tensor:
    """Return the one-dimensional tensors of ``count`` ranks, all of one size, as [count, size]."""
    found = own.new_empty(count, len(own))
    if len(own):
        getattr(dist, _ALL_GATHER)(found.view(-1), own, group)
    return found


class Whole:
    """The process has whole parameters: its sums are the sums, and nothing is sent.

    Attributes:
        is_cut: whether each process has a part of every parameter.
        count: R, the number of parts.
    """

    is_cut = False
    count = 1

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, the same in all of them."""
        return x

    def totals(self, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the sums of two tensors, the second of which may be missing."""
        return first, second

    def largest(self, numbers: list[float]) -> list[float]:
        """Return the largest of the processes' numbers, one by one."""
        return numbers

    def own_outputs(self, outputs: int) -> tuple[int, int]:
        """Return the first of this process's outputs, and the one behind the last."""
        return 0, outputs

    def gathered(self, parts: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
        """Return the whole tensors of which this process has ``parts``; ``outputs`` are their first dimensions."""
        return list(parts)


WHOLE = Whole()


class Shards(Whole):
    """The ranks of a group, each with its part of every parameter.

    Args:
        group: the ranks among which parameters are cut.
    """

    is_cut = True

    def __init__(self, group: Any) -> None:
        self._group = group
        self.count, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, bit for bit the same on all of them."""
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=self._group)
        return summed

    def totals(self, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the sums of two tensors, by one message."""
        if second is None:
            return self.total(first), None
        both = self.total(torch.cat([first.flatten(), second.flatten().to(first.dtype)]))
        return both[: first.numel()].view(first.shape), both[first.numel() :].view(second.shape)

    def largest(self, numbers: list[float]) -> list[float]:
        """Return the largest of the ranks' numbers, one by one."""
        of_ranks: list[Any] = [None] * self.count
        dist.all_gather_object(of_ranks, numbers, self._group)
        return [max(of_one) for of_one in zip(*of_ranks, strict=True)]

    def own_outputs(self, outputs: int) -> tuple[int, int]:
        """Return the first of this rank's outputs, and the one behind the last."""
        return self._outputs_of(self._rank, outputs)

    def _outputs_of(self, rank: int, outputs: int) -> tuple[int, int]:
        each = -(-outputs // self.count)
        return min(rank * each, outputs), min((rank + 1) * each, outputs)

    def gathered(self, parts: Sequence[Tensor], outputs: Sequence[int]) -> list[Tensor]:
        """Return the whole tensors, by one message for all of them; they have one dtype."""
        if not parts:
            return []
        each = [-(-total // self.count) * x.shape[1:].numel() for x, total in zip(parts, outputs, strict=True)]
        own = parts[0].new_zeros(sum(each))
        for place, x in zip(own.split(each), parts, strict=True):
            place[: x.numel()] = x.flatten()
        of_tensors = zip(all_gathered(own, self.count, self._group).split(each, 1), parts, outputs, strict=True)
        return [
            of_ranks.reshape(-1)[: total * x.shape[1:].numel()].view(total, *x.shape[1:])
            for of_ranks, x, total in of_tensors
        ]


def check_served(shards: Whole, history: int, gram: str) -> None:
    """Raise `ValueError` for settings with which no part of a curvature can be had."""
    if shards.is_cut and history != 1:
        raise ValueError(
            f"history={history} keeps rows of earlier refreshes, whose scale couples the parts of parameters of "
            "fully_shard: use history=1, or DistributedDataParallel"
        )
    if shards.is_cut and gram != "global":
        raise ValueError(
            f"gram={gram!r} takes steps of each process's own samples, but after fully_shard a process has a part of "
            'every parameter: use gram="global", or DistributedDataParallel'
        )


def check_still_served(model: nn.Module, shards: Whole) -> None:
    """Raise `RuntimeError` if a model was sharded after its optimizer, which has parameters that are no longer its own.

    torch's optimizers train nothing then.
    """
    if sharded_modules(model) and not shards.is_cut:
        raise RuntimeError(
            "fully_shard has replaced the model's parameters since the optimizer was made: make it after fully_shard"
        )


def shards_of(parameters: Iterable[Tensor]) -> Whole:
    """Return what cuts these parameters, which `check_placements` has checked."""
    first = next((p for p in parameters if is_sharded(p)), None)
    if first is None:
        return WHOLE
    cut: Any = first
    dim = next(dim for dim, one in enumerate(cut.placements) if one.is_shard())
    return Shards(cut.device_mesh.get_group(dim))
