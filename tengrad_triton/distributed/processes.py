"""What a step does for the other processes that train the same model: nothing in `OneProcess`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.contributions import Contributions, gather
from tengrad_triton.curvature.target import Target
from tengrad_triton.distributed.exchange import announce, gather_from_all, gather_own
from tengrad_triton.distributed.loading import check_loads
from tengrad_triton.distributed.ranks import Gram, Ranks, agree, check_still_alone, group_of, meet, meeting_of
from tengrad_triton.sharding.modules import gradient_divisor, reduces_unused
from tengrad_triton.sharding.tensors import is_sharded

Gather = Callable[[Sequence[LayerParams], Capture, bool], tuple[Contributions, dict[str, str]]]


class OneProcess:
    """A process that trains the model alone.

    Args:
        checks: whether a process group that is made later is an error.

    Attributes:
        several: whether there are others.
        averages: whether `end` averages the updates of all processes.
    """

    several = averages = False

    def __init__(self, checks: bool = True) -> None:
        self._checks = checks

    gather: Gather = staticmethod(gather)
    """Returns what was captured, and why some layers have no rows (`contributions.gather`)."""

    def agree(self, model: nn.Module, settings: Mapping[str, Any], seed: int) -> int:
        """Compare model and settings of all processes; return the seed that all of them use."""
        return seed

    def seed(self, generator: torch.Generator, seed: int, step: int) -> None:
        """Seed the generator of labels before the forward of a refresh, if each process has one of its own."""

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Return a context for a refresh: the other processes are told of an error for which they would wait."""
        yield

    @contextmanager
    def loading(self) -> Iterator[dict[str, int]]:
        """Return a context that checks a state; it adds the numbers that all processes need to have in common."""
        yield {}

    def begin(
        self, model: nn.Module, capture: Capture, step: int, targets: Sequence[Target], grads: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
    ) -> int:  # fmt: skip
        """Begin a refresh; return the number of its samples."""
        if self._checks:
            check_still_alone()
        return capture.samples

    def end(self, targets: Sequence[Target]) -> None:
        """End a step whose update is done."""

    def mean(self, number: float) -> float:
        """Return the mean of a number over the processes."""
        return number


class SeveralProcesses(OneProcess):
    """The processes of a group, each of which has a part of the batch.

    With ``gram="global"`` the curvature has the rows of all of them (`gather_from_all`), so that a step is that of one
    process with the whole batch. With ``"local"`` it has the process's own rows, and the steps are averaged: parameters
    and momenta are linear in the direction, so that their means are those of a step along the mean direction.

    Args:
        ranks: the processes.
        are_whole: whether each of them has whole parameters, which can be compared.
    """

    several = True

    def __init__(self, ranks: Ranks, are_whole: bool = True) -> None:
        super().__init__(checks=False)
        self._ranks, self._are_whole, self.averages = ranks, are_whole, ranks.gram == "local"
        self.gather, self._is_awaited = self._gather, False

    def __deepcopy__(self, memo: dict[int, Any]) -> SeveralProcesses:
        """Return the same processes: a group itself cannot be copied."""
        return SeveralProcesses(self._ranks, self._are_whole)

    def __reduce__(self) -> tuple[Any, ...]:
        """Become, in a pickle, the processes of the default group.

        Raises:
            TypeError: the group is another one.
        """
        if not self._ranks.is_default:
            raise TypeError(
                "an optimizer of a process group other than the default one cannot be pickled: save its state_dict()"
            )
        return processes_of, (None, self._ranks.gram, None)

    def agree(self, model: nn.Module, settings: Mapping[str, Any], seed: int) -> int:
        """Do what `agree` of `ranks` does."""
        return agree(self._ranks, model, settings, seed)

    def seed(self, generator: torch.Generator, seed: int, step: int) -> None:
        """Draw other labels than the other ranks, and after a restart the same ones as without it."""
        generator.manual_seed(self._ranks.seed(seed, step))

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Tell the other ranks of an error between `begin` and the exchange, so that each of them raises."""
        try:
            yield
        except Exception as error:
            if self._is_awaited:
                self._is_awaited = False
                announce(self._ranks, error)
            raise

    @contextmanager
    def loading(self) -> Iterator[dict[str, int]]:
        """Raise what was raised on one rank on all of them, where each has a part of the state to load.

        Raises:
            ValueError: another rank could not load its state, or one of other numbers.
        """
        said: dict[str, int] = {}
        error: Exception | None = None
        try:
            yield said
        except Exception as raised:
            error = raised
        if not self._are_whole:
            check_loads(self._ranks, error, said)
        if error is not None:
            raise error

    def _gather(
        self, layers: Sequence[LayerParams], capture: Capture, release_calls: bool
    ) -> tuple[Contributions, dict[str, str]]:
        self._is_awaited = False
        chosen = gather_own if self.averages else gather_from_all
        return chosen(self._ranks, layers, capture, release_calls)

    def begin(
        self, model: nn.Module, capture: Capture, step: int, targets: Sequence[Target], grads: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
    ) -> int:  # fmt: skip
        """Compare the ranks, and find out of how many samples the mean of their losses is the mean.

        Raises:
            ValueError: a layer mixes the samples of the ranks.
            RuntimeError: the ranks differ; every rank raises.
        """
        own = ([target.parameter for target in targets], grads) if self._are_whole else ([], [])
        meeting = meeting_of(step, capture.samples, *own, groups, self._unused(model, capture))
        samples = meet(self._ranks, meeting)
        self._is_awaited = True
        check_does_not_mix(model)
        if self.averages:
            return capture.samples
        capture.loss_samples = samples / gradient_divisor(model, self._ranks.count)
        return samples

    def _unused(self, model: nn.Module, capture: Capture) -> list[str] | None:
        """Return the parameters that no forward of this rank used, if `fully_shard` depends on that."""
        if self._are_whole or not capture.records or reduces_unused(model):
            return None
        unused = set.intersection(*(record.unused for record in capture.records))
        return list(capture.used.names(model, unused).values())

    def end(self, targets: Sequence[Target]) -> None:
        """Average the updates of ``gram="local"``."""
        if self.averages:
            self._ranks.mean_([x.detach() for target in targets for x in (target.parameter, target.momentum)])

    def mean(self, number: float) -> float:
        """Return the mean of a number over the ranks."""
        return self._ranks.mean(number)


def check_does_not_mix(model: nn.Module) -> None:
    """Raise `ValueError` if a layer's output for one sample depends on samples of other ranks."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            raise ValueError(
                f"the SyncBatchNorm {name!r} is in training, so that samples of different ranks depend on each other "
                "and have no rows of their own: use BatchNorm, or put it into evaluation"
            )


def processes_of(model: nn.Module | None, gram: Gram, process_group: Any) -> OneProcess:
    """Return what trains a model, wrapped or not, together with this process."""
    group = group_of(model, process_group)
    ranks = None if group is None else Ranks(group, gram)
    if ranks is None or ranks.count == 1:
        return OneProcess(checks=group is None or group is dist.group.WORLD)
    are_whole = model is None or not any(map(is_sharded, model.parameters()))
    return SeveralProcesses(ranks, are_whole)
